"""Compiler flags of the C++ core, for setup.py and for the test that reads the machine code."""

FLAGS = [
    *("-std=c++17", "-O3", "-Wall", "-Wextra", "-fvisibility=hidden", "-ffp-contract=off"),
    "-fno-stack-protector",  # distributions' Pythons ask for one: it puts vectors into memory
]
# Some GCC releases warn of undefined registers inside their own intrinsics headers (bug 105593).
INTRINSICS = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
# Where a loop of some twenty instructions happens to start decides how many fetches it takes: 15 %
# of a small product when another thread shares the core, and any edit elsewhere moves it.
ALIGN = ["-falign-loops=32"]
ISA_FLAGS = {
    "scalar": ["-O2"],  # the reference level, where the seconds go into compiling it
    "avx2": ["-mavx2", "-mfma", *ALIGN, *INTRINSICS],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", *ALIGN, *INTRINSICS],
}
# Levels that other instructions can stand in for (cpp/simd/emulated.h), for tests. Without
# optimization: they are slow anyway, and optimizing them, above all for a sanitizer, takes minutes.
# 512-bit types have no register ABI then, which matters to none but inline functions.
EMULATED_FLAGS = {"avx512": ["-mavx2", "-mfma", "-O0", "-Wno-psabi", *INTRINSICS]}

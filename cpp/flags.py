"""Compiler flags of the C++ core, for setup.py and for the test that reads the machine code."""

FLAGS = ["-std=c++17", "-O3", "-Wall", "-Wextra", "-fvisibility=hidden", "-ffp-contract=off"]
# Some GCC releases warn of undefined registers inside their own intrinsics headers (bug 105593).
INTRINSICS = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
# Where a loop of some twenty instructions happens to start decides how many fetches it takes: 15 %
# of a small product when another thread shares the core, and any edit elsewhere moves it.
ALIGN = ["-falign-loops=32"]
# Distributions' Pythons ask for a stack protector, which puts vectors of hot loops into memory.
VECTORS = [*ALIGN, *INTRINSICS, "-fno-stack-protector"]
ISA_FLAGS = {
    "scalar": [],  # -O2 would build it in half the time, and make float64 1.2 to 5 times slower
    "avx2": ["-mavx2", "-mfma", *VECTORS],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", *VECTORS],
}
# Levels that other instructions can stand in for (cpp/simd/emulated.h), for tests. Without
# optimization: they are slow anyway, and optimizing them, above all for a sanitizer, takes minutes.
# 512-bit types have no register ABI then, which matters to none but inline functions.
EMULATED_FLAGS = {"avx512": ["-mavx2", "-mfma", "-O0", "-Wno-psabi", *INTRINSICS]}

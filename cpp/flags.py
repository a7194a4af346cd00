"""Compiler flags of the C++ core, for setup.py and for the test that reads the machine code."""

FLAGS = ["-std=c++17", "-O3", "-Wall", "-Wextra", "-fvisibility=hidden", "-ffp-contract=off"]
# Some GCC releases warn of undefined registers inside their own intrinsics headers (bug 105593).
INTRINSICS = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
ISA_FLAGS = {
    "scalar": [],
    "avx2": ["-mavx2", "-mfma", *INTRINSICS],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", *INTRINSICS],
}

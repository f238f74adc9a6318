"""Runs a command in which the kernel refuses raw tracepoints, as a filter of system calls of a container may:

    python3 refuse-raw-tracepoints.py COMMAND ..
"""

import ctypes
import os
import struct
import sys

PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 22, 38
SECCOMP_MODE_FILTER = 2
SYS_BPF, BPF_RAW_TRACEPOINT_OPEN = 321, 17
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
ALLOW, EPERM = 0x7FFF0000, 0x00050001

# Offsets in seccomp_data: the system call's number is at 0, the low half of its first argument at 16.
instructions = [
    (LOAD, 0, 0, 0),
    (JUMP_IF_EQUAL, 0, 3, SYS_BPF),
    (LOAD, 0, 0, 16),
    (JUMP_IF_EQUAL, 0, 1, BPF_RAW_TRACEPOINT_OPEN),
    (RETURN, 0, 0, EPERM),
    (RETURN, 0, 0, ALLOW),
]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *instruction) for instruction in instructions))
program = struct.pack("HxxxxxxQ", len(instructions), ctypes.addressof(code))
libc = ctypes.CDLL(None, use_errno=True)
for arguments in [(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0)]:
    if libc.prctl(*arguments):
        sys.exit(f"prctl{arguments[:2]}: {os.strerror(ctypes.get_errno())}")
os.execvp(sys.argv[1], sys.argv[1:])

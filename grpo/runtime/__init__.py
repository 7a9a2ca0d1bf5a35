"""Processes: ranks and collectives, start-up checks, heartbeats, signals, memory that runs out or changes.

In: torchrun's environment variables. Out: `World` (distributed.py) with the collectives in use, and the parts that
notice a rank that hangs, dies, receives a signal or runs out of memory. A new collective goes into distributed.py and
nowhere else.
"""

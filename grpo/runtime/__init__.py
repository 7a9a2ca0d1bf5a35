"""Processes: ranks and collectives, start-up checks, heartbeats, signals, memory that runs out or changes.

In: what torchrun sets in the environment. Out: `World` (distributed.py), which offers the few collectives in use, and
the parts that notice a rank that hangs, dies, is asked to stop or runs out of memory. A new collective goes into
distributed.py and nowhere else.
"""

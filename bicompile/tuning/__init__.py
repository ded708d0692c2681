"""Measure schedules on this machine's GPU and write the preferences: ``python -m bicompile.tuning matmul``.

Tuning changes speed and can change no bit: only schedules that were admitted are measured, and what the tables name is
admitted again wherever it is used.
"""

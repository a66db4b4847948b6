"""One module a command: its docstring is the help text; ``SHORT``, ``EXAMPLES``, ``add_arguments``, ``run``.

They import what they run when they run it: ``trl-parity --help`` needs no torch.
"""

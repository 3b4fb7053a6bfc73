"""Formal proofs of Prestage's blocks: k-induction on small instances of the RTL.

``proofs`` lists them; ``harness`` and the modules named after blocks say what must hold; ``engine``
runs yosys, yosys-smtbmc and the solver; ``mutation`` breaks a block on purpose.
"""

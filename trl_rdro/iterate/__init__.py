"""Rounds of sample, judge, train, in which the reference and the sampling distribution move by set shares.

    from trl_rdro.iterate.rounds import Loop

The command is `trl-rdro iterate`; docs/iterate.md describes it.
"""

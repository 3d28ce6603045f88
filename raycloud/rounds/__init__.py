"""Rounds: edges contribute weights, the cloud aggregates them into the next version.

The state machine uses no link, file, clock or Ray, so actors and devices share it. An application adds rounds in six
steps:

1. It makes a :class:`~raycloud.rounds.machine.RoundMachine` with its initial weights.
2. It opens a round for its members with a deadline, and sends them the machine's weights.
3. It passes every contribution to ``accept``, tells the edge the reason of a refusal, and calls ``remove`` for a member
   that died or left, ``readmit`` for one that is back.
4. It calls ``close`` with the time after every such event and at the deadline. The call names the aggregator, one of
   :mod:`raycloud.rounds.aggregators` or its own, and optionally a gate. It returns None while the round goes on.
5. To restore an open round it writes ``state()`` with its own checkpoints, and makes the machine by ``from_state``.
   Between rounds, weights and version are enough to make one.
6. It adds the start and every new version to a :class:`~raycloud.rounds.versions.VersionStore` in ``versions/`` of its
   result directory, before its own checkpoint.
"""

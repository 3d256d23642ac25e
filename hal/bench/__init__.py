"""The measuring instrument: interleaved rounds, limits of the machine, peers, and a report that can be compared.

`rounds` times contenders A B A B …; `limits` are contenders like any other; `stats` condenses; `report` writes the
JSON document and compares it with an earlier one. What is particular to one operation is in a module of its own
(`mla`, `overhead`).
"""

"""Table 2: what is made of what was measured."""

from __future__ import annotations

from typing import Any

from bsns.bench.table2 import BATCHES, NETWORKS, NONE, _Bench

ONE_PROCESS = {"batch1": 40.0, "batch4": 100.0, "batch8": 160.0, "batch16": 200.0}


def test_ratios_are_of_medians_and_gains_of_rounds() -> None:
    client: Any = None
    bench = _Bench(client, client, 8)
    for number, name in enumerate((NONE, *NETWORKS)):
        for batch in BATCHES:
            for speculate in (False, True):
                rate = 10.0 * batch / (1 + number) * (2 if speculate else 1)
                bench._rates[name, batch, speculate] = [rate / 2, rate, 9 * rate]
        bench._own_ms[name] = [1.0, 2.0, 9.0]
        bench._gains[name, "repeated"] = [2.0, 3.0, 4.0]
        bench._gains[name, "random"] = [0.9, 1.0, 1.0]
    figures = bench.report(ONE_PROCESS)
    assert figures["table2"]["none"] == {"batch1": 10.0, "batch4": 40.0, "batch8": 80.0, "batch16": 160.0}
    assert figures["table2"]["1g5"]["batch8"] == 40.0
    assert figures["table2_guessing"]["1g5"]["batch8"] == 80.0
    assert figures["table2"]["of_no_network_1g5"] == dict.fromkeys(("batch1", "batch4", "batch8", "batch16"), 0.5)
    assert (figures["table2"]["scaling_1g5"], figures["table2"]["scaling_one_process"]) == (8.0, 4.0)
    assert figures["own_ms_per_hop"]["100m100"] == 2.0
    assert figures["spec"]["speedup"]["100m100"] == 3.0
    assert figures["spec"]["speedup_random"]["1g5"] == 1.0

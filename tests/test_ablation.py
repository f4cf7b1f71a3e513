"""What the ablation concludes from its figures."""

import math

import train
from ablation import CLAIMS, FIGURES, ROWS, SHARED, spread, table, verdict
from unix import PRESETS


def test_mean_and_spread():
    assert spread([1.0, 2.0, 3.0]) == (2.0, 1.0)
    assert spread([4.0])[0] == 4.0 and math.isnan(spread([4.0])[1])


def test_verdicts_are_by_differences_within_a_seed():
    mean, error, said = verdict([0.5, 0.7, 0.9], [0.4, 0.6, 0.8], True)     # rows vary, not the gap
    assert abs(mean - 0.1) < 1e-9 and error < 1e-9 and said == "reproduced"
    assert verdict([5.0, 6.0], [9.0, 10.5], False)[2] == "reproduced"       # less is better
    assert verdict([5.0, 6.0], [9.0, 10.5], True)[2] == "NOT REPRODUCED: the opposite"
    assert "within" in verdict([0.5, 0.7, 0.6], [0.6, 0.5, 0.7], True)[2]
    assert "within" in verdict([0.5, 0.5], [0.5, 0.5], True)[2]
    assert verdict([0.5], [0.1], True)[2] == "one seed cannot tell"


def test_every_row_draws_16_images_a_step():
    for batch, flags, *_ in ROWS.values():
        mix = flags.split("--mix ")[1].split()[0] if "--mix" in flags else "0:1"
        reads, draws = map(int, mix.split(":"))
        assert batch - round(batch * reads / (reads + draws)) == 16


def test_train_takes_the_flags_of_every_row():
    for _, flags, *_ in ROWS.values():
        assert not train.parse(["--stage", "2", *flags.split()]).problem()


def test_all_layers_are_all_layers():
    assert ROWS[SHARED][1].endswith(f"--share-layers {PRESETS['tiny'].layers}")


def test_the_table_has_a_line_a_row_and_a_line_a_claim():
    found = {row: [{figure: i + 0.1 * k for figure in FIGURES} for k in range(3)]
             for i, row in enumerate(ROWS)}
    lines = table(found).splitlines()
    assert len(lines) == 2 + len(ROWS) + 3 + len(CLAIMS)
    assert "| 1.100 ± 0.100 |" in lines[3] and "reproduced" in lines[-1].lower()

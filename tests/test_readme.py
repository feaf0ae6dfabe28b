"""The README's numbers are those of the cards and of the framing rows."""

import json
import re

import helpers


def _rows():
    text = (helpers.ROOT / "README.md").read_text(encoding="utf-8")
    table = text[text.index("| molecules | valid %") :].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_results_table_agrees_with_cards_and_framing():
    rows = {re.split("[,(]", row[0])[0].replace("`", "").strip(): row[1:] for row in _rows()}
    framing = helpers.framing_rows(10_000)
    expected = {row.name: row.as_dict() for row in framing}
    for name in helpers.RECIPES:
        card = json.loads((helpers.CHECKPOINTS / name / "card.json").read_text(encoding="utf-8"))
        if "valid" not in card["metrics"]:  # the oracle generates nothing
            continue
        settings = {name: card["metrics"]}
        if "metrics_fast" in card:
            settings[f"{name} in {card['metrics_fast']['num_inference_steps']} steps"] = card["metrics_fast"]
        expected |= settings
        for row, metrics in settings.items():
            assert rows[row][4] == f"{metrics['cpu_ms_per_molecule']:.1f}"
            assert rows[row][5] == f"{card['training_seconds'] / 60:.0f}"
    assert rows.keys() == expected.keys()
    for name, metrics in expected.items():
        shares = [f"{100 * metrics[key]:.1f}" for key in ("valid", "unique", "novel")]
        assert rows[name][:4] == [*shares, f"{metrics['fcd']:.2f}"], name


def test_reconstruction_in_the_readme_is_the_card_s():
    card = json.loads((helpers.CHECKPOINTS / "token_vae" / "card.json").read_text(encoding="utf-8"))
    share = f"{card['metrics']['exact_reconstruction_test']:.2%}".replace("%", " %")
    assert share in (helpers.ROOT / "README.md").read_text(encoding="utf-8")

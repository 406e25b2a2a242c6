"""No edit of a saved card, its files or its ledger gets past `verify`; the short form of benchmarks/verification.py."""

from benchmarks.verification import EDITS, measure


def test_no_edit_gets_past_verify(tmp_path):
    rows = measure(60, tmp_path)
    assert len(rows) == 1 + len(EDITS) and sum(row["tried"] for row in rows[1:]) == 60
    assert [row for row in rows if row["failed"]] == []

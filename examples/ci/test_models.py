"""The same as verify-models.yml for a suite of pytest: copy it to your tests and set the directories.

The fixture `qlx_verify` comes with `pip install 'qlx[test]'`. A failing test prints the whole report.
"""

import os

BASE = os.environ.get("BASE", "models/base")
ADAPTER = os.environ.get("ADAPTER", "models/adapter")
MERGED = os.environ.get("MERGED", "models/merged")


def test_the_adapter_computes_what_training_saw(qlx_verify):
    qlx_verify(ADAPTER, base=BASE)


def test_the_merged_model_computes_the_same(qlx_verify):
    qlx_verify(MERGED)


def test_merged_and_unmerged_agree(qlx_verify):
    report = qlx_verify(MERGED, against=ADAPTER, base=BASE, relative=1.5e-5)
    assert report.comparisons["against"].retention > 0.999

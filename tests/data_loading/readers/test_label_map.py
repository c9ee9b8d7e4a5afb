"""`--labels`: selecting, merging and naming classes, and malformed entries."""

from __future__ import annotations

import re
import unicodedata

import numpy as np
import pytest

from common.errors import UserError
from data_loading.readers.label_map import LabelMap, quoted

KNOWN = ("background", "kidney", "tumour")


def test_values_are_merged_and_selected_and_the_rest_is_background() -> None:
    labels = LabelMap.parse(["86,87=1:muscle", "5=2", "88-90=1"])
    assert labels.classes == ("background", "muscle", "5")
    mask = np.arange(256, dtype=np.uint8).reshape(1, 16, 4, 4)
    found = labels.apply(mask)
    assert (found.dtype, found.shape) == (np.uint8, mask.shape)
    assert {int(value): int(c) for value, c in zip(mask.ravel(), found.ravel(), strict=True) if c} == {
        5: 2,
        86: 1,
        87: 1,
        88: 1,
        89: 1,
        90: 1,
    }


def test_a_class_is_named_as_its_keys_are_written() -> None:
    assert LabelMap.parse(["128-255=1", "86,88-90=2"]).classes == ("background", "128-255", "86+88-90")
    assert LabelMap.parse(["1-2=1"], KNOWN).classes == ("background", "kidney+tumour")


def test_0_may_be_a_class_and_keys_may_be_names() -> None:
    assert LabelMap.parse(["0=1:membrane"]).apply(np.array([0, 255], np.uint8)).tolist() == [1, 0]
    labels = LabelMap.parse(["autochthon_left,autochthon_right=1", "liver=2"])
    assert labels.classes == ("background", "autochthon_left+autochthon_right", "liver")
    assert [labels.class_of(name) for name in ("autochthon_right", "liver", "spleen")] == [1, 2, 0]


def test_class_names_of_the_data_set_may_be_keys() -> None:
    assert LabelMap.parse(["kidney,tumour=1"], KNOWN) == LabelMap.parse(["1,2=1:kidney+tumour"], KNOWN)
    assert LabelMap.parse(["2=1"], KNOWN).classes == ("background", "tumour")


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["86"], "--labels 86: expected VALUES=CLASS, such as 86,87=1 or 5=2:liver"),
        (["86=muscle"], "expected VALUES=CLASS"),
        (["86=2"], r"classes must be numbered 1, 2, … without a gap, found \[2\]"),
        (["86=0"], r"without a gap, found \[0\]"),
        (["86=1", "86=2"], "--labels 86=2: 86 is listed twice"),
        (["80-90=1", "86=2"], "86 is listed twice"),
        (["86=1:a", "87=1:b"], "class 1 is already named a"),
        (["86=1:a", "87=2:a"], "two classes have the same name"),
        (["3000000000=1"], "3000000000 is not a label from -2147483648 to 2147483647"),
        (["1-100000=1"], "1-100000 holds more than 65536 values"),
        (['""=1'], "expected VALUES=CLASS"),
        (["9-3=1"], "9-3 is not a label"),
        ([",5=1"], "a key is empty"),
    ],
)
def test_bad_entries_are_reported_in_one_line(tokens: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LabelMap.parse(tokens)


def test_labels_that_the_data_set_lacks_are_reported() -> None:
    with pytest.raises(UserError, match="--labels 7=1: 7 is not a label from 0 to 2"):
        LabelMap.parse(["7=1"], KNOWN)
    with pytest.raises(UserError, match="unknown label 'liver'; available: background, kidney, tumour"):
        LabelMap.parse(["liver=1"], KNOWN)
    with pytest.raises(UserError, match="--labels spleen: no mask of that name in here; available: liver"):
        LabelMap.parse(["spleen=1"]).check_names({"liver", 3}, "here")


def test_without_entries_every_value_is_a_class_in_ascending_order() -> None:
    labels = LabelMap.from_keys({0, 255, 7}, "masks")
    assert (labels.pairs, labels.classes) == (((7, 1), (255, 2)), ("background", "7", "255"))
    assert LabelMap.from_keys({"liver", "aorta"}, "masks").classes == ("background", "aorta", "liver")
    with pytest.raises(UserError, match="masks: every mask is empty"):
        LabelMap.from_keys({0}, "masks")
    with pytest.raises(UserError, match=r"the masks hold 99 values; select and merge with --labels, such as 128-255=1"):
        LabelMap.from_keys(set(range(100)), "masks")


def test_any_integer_may_be_a_key_and_all_others_are_the_rest() -> None:
    labels = LabelMap.parse(["-5--3=1:below", "14175,256=2:above", "-1=3"])
    mask = np.array([-(2**31), -6, -5, -3, -2, -1, 0, 255, 256, 257, 14175, 2**31 - 1], np.int32)
    assert labels.apply(mask).tolist() == [0, 0, 1, 1, 0, 3, 0, 0, 2, 0, 2, 0]
    far = LabelMap.parse([f"{-(2**31)}=1", f"{2**31 - 1}=2", "0=3"])
    assert far.apply(mask).tolist() == [1, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 2]
    assert LabelMap.parse(["300=1"]).apply(np.array([300 - 256, 255], np.uint8)).tolist() == [0, 0]


@pytest.mark.parametrize("name", ["left, lower", "grade=3", "12", "3-5", "-1", "e\u0301toile"])
def test_any_name_can_be_chosen(name: str) -> None:
    entry = f"{quoted(name)},liver=1:one"
    labels = LabelMap.parse([entry, "5=2"])
    assert (labels.class_of(name), labels.class_of("liver"), labels.class_of("spleen")) == (1, 1, 0)
    labels.check_names({unicodedata.normalize("NFC", name), "liver"}, "here")
    with pytest.raises(UserError, match=f"available: {re.escape(quoted('12'))}, spleen"):
        labels.check_names({"12", "spleen"}, "here")

"""Sentences with the label that a person reads from them, by kind of difficulty; texts that cannot be read.

    template file -> text with [a|b] choices and {slots} | wanted labels -> several sentences, slots filled in

The header of data/label_templates_1.txt lists the notation. A template belongs to half "a" or "b" by the SHA-256 of its
text. Rules were written from file 0 and half "a" of file 1. Half "b", file 2, and files from 3 on (by writers who did
not know the rules) were scored once before their errors were fixed; the header of a file has the figures.
"""

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from sae_lens_maira.errors import StudyError
from sae_lens_maira.studies import Licence, RuleLabel, RuleStatus, Study, known_findings, rule_reader
from sae_lens_maira.studies.labels import is_unknown, rule_labels

STATUS_OF_LETTER = {"P": "present", "A": "absent", "U": "uncertain", "N": "none", "X": "unknown"}
NOUNS = {
    "pneumothorax": ("a pneumothorax", "an apical pneumothorax", "a pneumothorax"),
    "pleural_effusion": ("a pleural effusion", "an effusion", "pleural fluid"),
    "edema": ("pulmonary edema", "interstitial edema", "edema"),
    "consolidation": ("consolidation", "airspace consolidation", "focal consolidation"),
    "pneumonia": ("pneumonia", "lobar pneumonia", "bronchopneumonia"),
    "atelectasis": ("atelectasis", "subsegmental atelectasis", "compressive atelectasis"),
    "cardiomegaly": ("cardiomegaly",),
    "lung_lesion": ("a pulmonary nodule", "a lung mass", "a lung nodule"),
    "lung_opacity": ("an airspace opacity", "an opacity", "a parenchymal opacity"),
    "fracture": ("a rib fracture", "a clavicle fracture", "a rib fracture"),
    "pleural_other": ("pleural thickening", "a pleural plaque"),
}
GROUPS = {
    "any": tuple(NOUNS),
    "lung": ("edema", "consolidation", "pneumonia", "atelectasis", "lung_opacity"),
    "air": ("consolidation", "pneumonia", "atelectasis"),
    "pleura": ("pneumothorax", "pleural_effusion"),
    "count": ("fracture", "lung_lesion"),
}
PASSING = (
    "pneumothorax",
    "pleural_effusion",
    "edema",
    "consolidation",
    "pneumonia",
    "atelectasis",
    "lung_opacity",
)
DEVICES = (
    "endotracheal tube", "ET tube", "nasogastric tube", "enteric tube", "right internal jugular catheter",
    "left PICC line", "chest tube", "pigtail catheter", "Swan-Ganz catheter", "dialysis catheter",
    "tracheostomy tube", "Dobbhoff tube", "right IJ line", "feeding tube", "central venous catheter",
)  # fmt: skip


@dataclass(frozen=True)
class LabelledSentence:
    """One sentence and the statuses that are right for it, by observation ("a/b": either of two)."""

    kind: str
    template: str
    half: str
    text: str
    wanted: dict[str, frozenset[str]]

    def errors(self, labels: dict[str, RuleLabel]) -> list[str]:
        """Observations that were read wrongly, listed ones and those present without being listed."""
        status = {name: label.status.value for name, label in labels.items()}
        wrong = [
            key
            for key, right in self.wanted.items()
            if not any(status.get(n, "none") in right for n in key.split("/"))
        ]
        named = {name for key in self.wanted for name in key.split("/")}
        return wrong + [
            name
            for name, one in status.items()
            if one == RuleStatus.PRESENT.value and name not in named and name != "no_finding"
        ]


def sentences(path: Path, per_template: int = 7) -> Iterator[LabelledSentence]:
    """Sentences of a template file, the same on every call.

    Args:
        path: The template file.
        per_template: Number of sentences per template, duplicates are left out.

    Yields:
        The sentences in the order of the file.
    """
    kind = ""
    for line in path.read_text("utf-8").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        if title := re.fullmatch(r"\[([\w ]+)\]", line):
            kind = title[1]
            continue
        template, wanted = line.rsplit(" | ", 1)
        digest = hashlib.sha256(template.encode()).hexdigest()
        seen = set()
        for repeat in range(per_template):
            text, names = _filled(template, kind, repeat, random.Random(f"{digest} {repeat}"))
            if text not in seen:
                seen.add(text)
                yield LabelledSentence(
                    kind, template, "ab"[int(digest, 16) % 2], text, _wanted(wanted, names)
                )


def _filled(template: str, kind: str, repeat: int, rng: random.Random) -> tuple[str, dict[str, str]]:
    """A sentence, and slot -> observation. Choices rotate with `repeat`, findings are drawn without repeats."""

    def choice(match: re.Match[str]) -> str:
        options = match[1].split("|")
        return options[repeat % len(options)]

    text = re.sub(r"\[([^\[\]]*\|[^\[\]]*)\]", choice, template).replace("\\n", "\n").replace("\\t", "\t")
    names: dict[str, str] = {}

    def noun(match: re.Match[str]) -> str:
        article, slot = match[1], match[2].lower()
        if slot.startswith("dev"):
            word = names.setdefault(slot, rng.choice([d for d in DEVICES if d not in names.values()]))
        else:
            if slot not in names:
                group = slot.rstrip("0123456789")
                pool = PASSING if group == "any" and "resol" in kind else GROUPS.get(group, (group,))
                one_sided = re.search(r"\b(left|right|base|zone|basilar|lingula)\b", text.lower())
                names[slot] = rng.choice(
                    [n for n in pool if n not in names.values() and not (one_sided and n == "cardiomegaly")]
                )
            word = rng.choice(NOUNS[names[slot]])
            word = word if article else re.sub(r"^an? ", "", word)
        return word[0].upper() + word[1:] if match[2][0].isupper() else word

    filled = re.sub(r"\{(a )?(\w+)\}", noun, text)
    return re.sub(r"\b([Aa]) (?=[aeiouAEIOU])", r"\1n ", filled), names


def _wanted(wanted: str, names: dict[str, str]) -> dict[str, frozenset[str]]:
    pairs = (one.strip().split("=") for one in wanted.split(";"))
    return {
        names.get(key, key): frozenset(STATUS_OF_LETTER[letter] for letter in letters)
        for key, letters in pairs
    }


FILES = sorted((Path(__file__).parent / "data").glob("label_templates*.txt"))
UNREADABLE = (
    "None.",
    "nan",
    "Null",
    "See above.",
    "12.3",
    "-",
    "Dictated.",
    "x x x",
    "Kein Pneumothorax, Herz normal groß.",
)


@cache
def by_kind() -> dict[str, list[LabelledSentence]]:
    """Sentences of all template files per kind."""
    kinds: dict[str, list[LabelledSentence]] = {}
    for file in FILES:
        for sentence in sentences(file):
            kinds.setdefault(sentence.kind, []).append(sentence)
    return kinds


def test_no_template_file_is_empty_and_each_frequent_kind_has_110_sentences() -> None:
    assert len(FILES) >= 10
    assert len(by_kind()) == 19
    assert min(len(group) for group in by_kind().values()) >= 110


@pytest.mark.parametrize("kind", by_kind())
def test_sentences_by_kind(kind: str) -> None:
    """Each sentence has the label that a person reads, and no observation that it does not state is present."""
    wrong = [
        (sentence.text, errors)
        for sentence in by_kind()[kind]
        if (errors := sentence.errors(rule_labels(sentence.text)))
    ]
    assert not wrong


def test_a_text_that_cannot_be_read_is_unknown() -> None:
    for text in UNREADABLE:
        assert is_unknown(rule_labels(text)), text
        study = Study(study_id="s", patient_id="p", licence=Licence.PUBLIC, frontal="a.png", report=text)
        with pytest.raises(StudyError, match="1 of 1 studies cannot be read"):
            known_findings([study], rule_reader())

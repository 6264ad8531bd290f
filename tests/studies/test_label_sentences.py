"""Sentences with the label that a reader would give, by kind of difficulty.

    kind -> templates -> one sentence per finding or device that fits the braces

A template is "sentence | observation=status ...". `{F}` and `{G}` are two different findings, `{D}` is a device; their
statuses are written F=, G= and D=. Status "-" means that the sentence states nothing. Templates at even places are the
first half, which rules may be written from; the others are the second half, which is scored only.
"""

import itertools
from typing import NamedTuple

import pytest

from sae_lens_maira.errors import StudyError
from sae_lens_maira.studies import Licence, Study, known_findings, rule_reader
from sae_lens_maira.studies.labels import is_unknown, rule_labels

FINDINGS = {
    "pneumothorax": "pneumothorax",
    "pleural effusion": "pleural_effusion",
    "consolidation": "consolidation",
    "pulmonary edema": "edema",
    "pneumonia": "pneumonia",
    "atelectasis": "atelectasis",
    "rib fracture": "fracture",
    "lung nodule": "lung_lesion",
    "airspace opacity": "lung_opacity",
}
DEVICES = (
    "endotracheal tube",
    "nasogastric tube",
    "chest tube",
    "PICC line",
    "dialysis catheter",
    "pacemaker",
    "pigtail",
    "central venous catheter",
    "tracheostomy",
)
TEMPLATES = {
    "removed device": (
        "The {D} has been removed. | D=absent",
        "Interval removal of the {D}. | D=absent",
        "{D} removed. | D=absent",
        "Status post removal of a left {D}. | D=absent",
        "The previously seen {D} is no longer present. | D=absent",
        "Since the prior study the {D} was removed. | D=absent",
        "There has been interval removal of {D}. | D=absent",
        "The patient has been extubated and the {D} has been taken out. | D=absent",
        "The {D} has been withdrawn completely. | D=absent",
        "No {D} is seen after its removal. | D=absent",
        "The {D} has also been removed. | D=absent",
        "Following removal of the right {D} the lungs are unchanged. | D=absent",
    ),
    "device in place": (
        "The {D} is in unchanged position. | D=present",
        "The {D} was replaced and ends in standard position. | D=present",
        "Interval placement of a {D}. | D=present",
        "The {D} has not been removed. | D=present",
        "A new {D} has been inserted. | D=present",
        "The {D} has been pulled back by 2 cm. | D=present",
    ),
    "denial inside the mention": (
        "The mediastinum is not widened. | enlarged_cardiomediastinum=absent",
        "The mediastinum does not appear widened. | enlarged_cardiomediastinum=absent",
        "The heart does not appear enlarged. | cardiomegaly=absent",
        "The cardiac silhouette is not significantly enlarged. | cardiomegaly=absent",
        "Mediastinal contours are not enlarged. | enlarged_cardiomediastinum=absent",
        "The heart size is not enlarged. | cardiomegaly=absent",
        "The mediastinum is neither shifted nor widened. | enlarged_cardiomediastinum=absent",
        "Cardiac silhouette does not look enlarged. | cardiomegaly=absent",
        "The heart isn't enlarged. | cardiomegaly=absent",
        "The mediastinal silhouette isn't widened. | enlarged_cardiomediastinum=absent",
        "The lung is not collapsed and the heart is not large. | cardiomegaly=absent",
        "The heart doesn't appear large. | cardiomegaly=absent",
        "The cardiomediastinal silhouette is not enlarged. | enlarged_cardiomediastinum=absent",
        "The superior mediastinum is no longer widened. | enlarged_cardiomediastinum=absent",
    ),
    "silhouette": (
        "The cardiomediastinal silhouette is enlarged. | enlarged_cardiomediastinum=present",
        "Cardiomediastinal silhouette remains mildly enlarged. | enlarged_cardiomediastinum=present",
        "There is enlargement of the cardiomediastinal silhouette. | enlarged_cardiomediastinum=present",
        "The cardiomediastinal contours are widened. | enlarged_cardiomediastinum=present",
        "The cardiomediastinal silhouette is normal. | enlarged_cardiomediastinum=absent",
        "The cardiomediastinal contour is unremarkable. | enlarged_cardiomediastinum=absent",
        "Stable enlarged cardiomediastinal silhouette. | enlarged_cardiomediastinum=present",
        "The cardiomediastinal silhouette appears prominent. | enlarged_cardiomediastinum=present",
    ),
    "technique clause": (
        "Sensitivity to detect a {F} is reduced on a supine radiograph. | F=-",
        "The supine position limits detection of {F}. | F=-",
        "Evaluation for {F} is limited by rotation. | F=-",
        "Supine technique reduces the sensitivity for {F}. | F=-",
        "Assessment for {F} is limited on this single view. | F=-",
        "The study is limited in its ability to detect a {F}. | F=-",
        "Low lung volumes decrease sensitivity for detection of {F}. | F=-",
        "Portable technique makes detection of {F} difficult. | F=-",
        "This examination is not sensitive for {F}. | F=-",
        "Radiographs are insensitive for the detection of {F}. | F=-",
        "Limited evaluation for {F}. | F=-",
        "Sensitivity for {F} is low in this projection. | F=-",
    ),
    "versus": (
        "{F} versus {G}. | F=uncertain G=uncertain",
        "This may be {F} versus {G}. | F=uncertain G=uncertain",
        "Left basilar {F} vs. {G}. | F=uncertain G=uncertain",
        "Findings reflect {F} vs {G}. | F=uncertain G=uncertain",
        "There is right {F} versus early {G} at the base. | F=uncertain G=uncertain",
        "Likely {F} versus developing {G}. | F=uncertain G=uncertain",
        "Retrocardiac density is either {F} or {G}. | F=uncertain G=uncertain",
        "Differential includes {F} versus {G}. | F=uncertain G=uncertain",
    ),
    "incomplete resolution": (
        "Near complete resolution of the {F}. | F=present",
        "Incomplete resolution of the {F}. | F=present",
        "The {F} has almost completely resolved. | F=present",
        "The {F} has nearly resolved. | F=present",
        "There is partial resolution of {F}. | F=present",
        "The {F} has partially resolved. | F=present",
        "The {F} has not resolved. | F=present",
        "The {F} has not yet cleared. | F=present",
        "The {F} is resolving. | F=present",
        "The {F} has incompletely resolved. | F=present",
        "Near-resolution of the left {F}. | F=present",
        "The right {F} has resolved almost entirely. | F=present",
    ),
    "resolution": (
        "Interval resolution of {F}. | F=absent",
        "Complete resolution of the {F}. | F=absent",
        "The {F} has completely resolved. | F=absent",
        "There has been resolution of the left {F}. | F=absent",
        "Previously seen {F} has resolved. | F=absent",
        "Prior {F} has cleared. | F=absent",
        "The {F} is no longer seen. | F=absent",
        "Resolved {F}. | F=absent",
        "Interval clearing of the {F}. | F=absent",
        "The {F} has disappeared in the interval. | F=absent",
        "The previous {F} is no longer visible. | F=absent",
        "Resolution of the previously noted {F}. | F=absent",
    ),
    "unlikely": (
        "{F} is unlikely. | F=absent",
        "{F} is considered unlikely. | F=absent",
        "{F} is less likely. | F=uncertain",
        "{F} is felt to be less likely. | F=uncertain",
        "Less likely {F}. | F=uncertain",
        "The finding is unlikely to represent {F}. | F=absent",
        "{F} seems unlikely. | F=absent",
        "{F} is very unlikely. | F=absent",
        "This is unlikely to be {F}. | F=absent",
        "Findings are less likely to be {F}. | F=uncertain",
        "{F} is highly unlikely. | F=absent",
        "An unlikely consideration is {F}. | F=absent",
    ),
    "list": (
        "- No {F}\n- Small {G} | F=absent G=present",
        "* Small {F}\n* No {G} | F=present G=absent",
        "1. No {F}\n2. Mild {G} | F=absent G=present",
        "1) Moderate {F}\n2) No {G} | F=present G=absent",
        "- {F}: none\n- {G}: small | F=absent G=present",
        "- {F}: present\n- {G}: absent | F=present G=absent",
        "No {F}\nLarge {G} | F=absent G=present",
        "Stable {F}\nNo evidence of {G} | F=present G=absent",
    ),
    "value behind a colon": (
        "{F}: None. | F=absent",
        "{F}: No. | F=absent",
        "{F}: Absent. | F=absent",
        "{F}: none seen. | F=absent",
        "{F}: negative | F=absent",
        "{F}: Not present. | F=absent",
        "{F}: Present. | F=present",
        "{F}: Yes. | F=present",
        "{F}: Small, left. | F=present",
        "{F}: Moderate on the right. | F=present",
        "{F}: possible. | F=uncertain",
        "{F}: Questionable. | F=uncertain",
    ),
    "scope": (
        "No {F} and no {G}. | F=absent G=absent",
        "No {F} or {G} is seen. | F=absent G=absent",
        "No {F}, moderate {G}. | F=absent G=present",
        "No {F} and a small {G}. | F=absent G=present",
        "There is {F} and no {G}. | F=present G=absent",
        "There is {F} without {G}. | F=present G=absent",
        "No focal {F}, {G}, or cyst. | F=absent G=absent",
        "The lungs are free of {F} and {G}. | F=absent G=absent",
        "{F} is present, {G} is not. | F=present G=absent",
        "{F} is seen; {G} is absent. | F=present G=absent",
        "Neither {F} nor {G} is identified. | F=absent G=absent",
        "No {F}, but {G} persists. | F=absent G=present",
    ),
    "history": (
        "History of {F}. | F=-",
        "INDICATION: History of {F}. | F=-",
        "Indication: evaluate for {F}. | F=-",
        "Clinical history: {F}. | F=-",
        "55-year-old man with a history of {F}. | F=-",
        "Patient with known history of {F}. | F=-",
        "Reason for exam: rule out {F} | F=-",
        "HISTORY: {F}, follow-up. | F=-",
        "Past medical history includes {F}. | F=-",
        "Woman with fever, evaluate for {F}. | F=-",
    ),
    "to exclude": (
        "Recommend CT to exclude {F}. | F=uncertain",
        "CT is advised to exclude {F}. | F=uncertain",
        "Lateral view to rule out {F}. | F=uncertain",
        "Follow-up is recommended to rule out {F}. | F=uncertain",
        "Further imaging may be needed to exclude an underlying {F}. | F=uncertain",
        "Repeat film suggested to exclude a small {F}. | F=uncertain",
        "{F} is not excluded. | F=uncertain",
        "{F} cannot be entirely excluded. | F=uncertain",
        "Unable to exclude {F}. | F=uncertain",
        "It is difficult to exclude {F}. | F=uncertain",
    ),
    "question mark": (
        "? {F} | F=uncertain",
        "{F}? | F=uncertain",
        "Left basal density, ?{F}. | F=uncertain",
        "Query {F}. | F=uncertain",
        "Is there {F}? | F=uncertain",
        "Possible {F}? | F=uncertain",
        "?? {F} at the left base. | F=uncertain",
        "{F} (?) at the right base. | F=uncertain",
    ),
    "slash": (
        "There is {F}/{G}. | F=present G=present",
        "No {F}/{G}. | F=absent G=absent",
        "Possible {F}/{G}. | F=uncertain G=uncertain",
        "Bibasilar {F}/{G} persists. | F=present G=present",
        "No evidence of {F} / {G}. | F=absent G=absent",
        "{F}/{G} cannot be excluded. | F=uncertain G=uncertain",
        "Without {F}/{G}. | F=absent G=absent",
        "May represent {F}/{G}. | F=uncertain G=uncertain",
    ),
    "apostrophe": (
        "Can\u2019t exclude {F}. | F=uncertain",
        "We couldn\u2019t identify {F}. | F=absent",
        "The film doesn\u2019t show {F}. | F=absent",
        "{F} isn\u2019t seen. | F=absent",
        "{F} can\u2019t be excluded. | F=uncertain",
        "{F} wasn\u2019t identified. | F=absent",
        "I don\u2019t see {F}. | F=absent",
        "There isn\u2019t any {F}. | F=absent",
    ),
    "plain": (
        "There is {F}. | F=present",
        "No {F}. | F=absent",
        "Small left {F} is unchanged. | F=present",
        "New {F} at the right base. | F=present",
        "There is no evidence of {F}. | F=absent",
        "{F} is not seen. | F=absent",
        "Findings are concerning for {F}. | F=present",
        "{F} cannot be excluded. | F=uncertain",
        "Possible {F}. | F=uncertain",
        "Stable {F}. | F=present",
        "No new {F} is seen. | F=absent",
        "{F} has increased. | F=present",
    ),
}
UNREADABLE = (  # texts that are not an English report: no label but "unknown"
    (
        "None.",
        "nan",
        "Null",
        "See above.",
        "See impression.",
        "Se observa derrame pleural izquierdo.",
        "12.3",
        "n/a",
    ),
    (
        "None",
        "NaN",
        "-",
        "Pending.",
        "Dictated.",
        "Kein Pneumothorax, Herz normal gro\u00df.",
        "Sin hallazgos.",
        "x x x",
    ),
)


class Case(NamedTuple):
    """A sentence of one kind and half, with the status wanted per observation (None: no statement)."""

    kind: str
    half: int
    text: str
    wanted: dict[str, str | None]


def cases() -> list[Case]:
    """All sentences; a finding is the subject of each template once."""
    made = []
    names = list(FINDINGS)
    for kind, templates in TEMPLATES.items():
        for place, template in enumerate(templates):
            text, _, labels = template.rpartition(" | ")
            wanted = dict(label.split("=") for label in labels.split())
            words = DEVICES if "{D}" in text else names if "{F}" in text else ("",)
            for number, word in enumerate(words):
                other = names[(number + 1 + place) % len(names)]
                if other == word:
                    other = names[(number + 1) % len(names)]
                keys = {"F": FINDINGS.get(word), "G": FINDINGS[other], "D": "support_devices"}
                filled = text.replace("{F}", word).replace("{G}", other).replace("{D}", word)
                filled = filled[0].upper() + filled[1:]
                statuses = {
                    keys.get(key) or key: None if status == "-" else status for key, status in wanted.items()
                }
                made.append(Case(kind, place % 2, filled, statuses))
    return made


def by_kind() -> dict[tuple[str, int], list[Case]]:
    """Cases per kind and half."""
    return {
        key: list(group)
        for key, group in itertools.groupby(
            sorted(cases(), key=lambda case: case[:2]), key=lambda case: (case.kind, case.half)
        )
    }


@pytest.mark.parametrize(("kind", "half"), by_kind())
def test_sentences_by_kind(kind: str, half: int) -> None:
    """Each of 1,480 sentences has the label that a reader would give it."""
    wrong = []
    for case in by_kind()[kind, half]:
        labels = rule_labels(case.text)
        status = {name: labels[name].status.value if name in labels else None for name in case.wanted}
        if status != case.wanted:
            wrong.append((case.text, status, case.wanted))
    assert not wrong


@pytest.mark.parametrize("text", [text for half in UNREADABLE for text in half])
def test_a_text_that_cannot_be_read_is_unknown(text: str) -> None:
    assert set(rule_labels(text)) == {"no_finding"}
    assert is_unknown(rule_labels(text))
    study = Study(study_id="s", patient_id="p", licence=Licence.PUBLIC, frontal="a.png", report=text)
    with pytest.raises(StudyError, match="1 of 1 studies cannot be read"):
        known_findings([study], rule_reader())

"""The words of the phantom: frames for statements, denials, indications and the other sections.

Frames hold slots: {np} the bare noun phrase, {a} and {A} with its article, {the} and {The}, {new} with "new".
The shipped model was trained on these very sentences: changing one means training again. Plain ASCII, fewer
than 200 words in all, sections included.
"""

from __future__ import annotations

DOUBT_RATE = 0.08
MASS_NOUNS = ("oedema", "atelectasis", "cardiomegaly")

GROUP = {
    "pacemaker": 0,
    "endotracheal tube": 0,
    "central venous line": 0,
    "nasogastric tube": 0,
    "cardiomegaly": 1,
    "oedema": 2,
    "consolidation": 2,
    "atelectasis": 2,
    "nodule": 2,
    "pleural effusion": 3,
    "pneumothorax": 3,
    "rib fracture": 4,
}

PRESENT = ("There is {a}.", "{A} is present.", "{A} is seen.", "{A} is noted.")
IN_PLACE = ("{A} is in place.", "{A} is present.", "There is {a}.", "{A} is seen.")
DOUBTED = ("Possible {np}.", "There may be {a}.", "Findings may represent {a}.")
CHANGED = {
    "new": ("New {np}.", "There is {new}.", "{A} is new since the prior."),
    "larger": (
        "{The} has increased since the prior.",
        "{The} is larger than before.",
        "Interval increase in {the}.",
    ),
    "smaller": (
        "{The} has decreased since the prior.",
        "{The} is smaller than before.",
        "Interval decrease in {the}.",
    ),
    "unchanged": ("Unchanged {np}.", "Stable {np}.", "{The} is unchanged."),
    "removed": (
        "The previously seen {np} has resolved.",
        "Interval resolution of {the}.",
        "The previously seen {np} is no longer seen.",
    ),
}
TAKEN_OUT = (
    "The previously seen {np} has been removed.",
    "{The} has been removed.",
    "Interval removal of {the}.",
)
HEART = {
    None: (
        "The heart is enlarged.",
        "Cardiomegaly is present.",
        "The cardiac silhouette is enlarged.",
        "There is cardiomegaly.",
    ),
    "new": ("The heart is newly enlarged.", "New cardiomegaly.", "There is new cardiomegaly."),
    "unchanged": ("The heart remains enlarged.", "Unchanged cardiomegaly.", "Stable cardiomegaly."),
}

NORMAL_HEART = (
    "The heart size is normal.",
    "Heart size is within normal limits.",
    "The cardiac silhouette is normal in size.",
    "The heart is not enlarged.",
)
CLEAR_LUNGS = (
    "The lungs are clear.",
    "Both lungs are clear.",
    "The lungs are clear without focal consolidation.",
)
NO_CONSOLIDATION = ("No focal consolidation.", "There is no consolidation.", "No consolidation is seen.")
NO_FLUID = ("No pleural effusion.", "There is no pleural effusion.", "No pleural effusion is seen.")
NO_AIR = ("No pneumothorax.", "There is no pneumothorax.", "No pneumothorax is seen.")
NO_FLUID_NO_AIR = (
    "No pleural effusion or pneumothorax.",
    "There is no pleural effusion or pneumothorax.",
    "No pneumothorax or pleural effusion is seen.",
)
NO_OEDEMA = ("No pulmonary edema.", "There is no pulmonary edema.")
NO_FRACTURE = ("No rib fracture.", "The bones are intact.", "No acute rib fracture is seen.")
NO_NODULE = ("No lung nodule.", "There is no nodule.")
NO_DEVICE = ("No support devices are seen.", "No lines or tubes.")

INDICATIONS = (
    "Shortness of breath.",
    "Chest pain.",
    "Fever and cough.",
    "Evaluate for pneumonia.",
    "Evaluate line placement.",
    "Check tube position.",
    "Fall with chest wall pain.",
    "Heart failure.",
    "Routine follow up.",
    "Before surgery.",
    "Evaluate for pneumothorax.",
)
HINTS = {
    "pleural effusion": 0,
    "pneumothorax": 10,
    "consolidation": 3,
    "cardiomegaly": 7,
    "oedema": 7,
    "central venous line": 4,
    "endotracheal tube": 5,
    "nasogastric tube": 5,
    "rib fracture": 6,
}
HINT_RATE = 0.25
"""How often the indication hints at a finding; otherwise it is sampled at random from the same list."""

ONE_VIEW = ("Single frontal view of the chest.", "Portable frontal radiograph of the chest.")
TWO_VIEWS = ("Frontal and lateral views of the chest.", "Two views of the chest.")
COMPARED = (
    "Prior frontal radiograph.",
    "Chest radiograph of the previous day.",
    "Chest radiograph of last week.",
)
NOT_COMPARED = ("None.", "No prior studies.")

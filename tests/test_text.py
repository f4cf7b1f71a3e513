"""The rule labeler and the report cleaner, on sentences written for these tests."""
import time

import pytest

import data
from data import clean_checked, clean_report, label_report, locate, split_sections

SHORT = {"heart": "Cardiomegaly", "mediastinum": "Enlarged Cardiomediastinum", "edema": "Edema",
         "opacity": "Lung Opacity", "lesion": "Lung Lesion", "consolidation": "Consolidation",
         "pneumonia": "Pneumonia", "atelectasis": "Atelectasis", "pneumothorax": "Pneumothorax",
         "effusion": "Pleural Effusion", "pleura": "Pleural Other", "fracture": "Fracture",
         "device": "Support Devices", "none": "No Finding"}


@pytest.mark.parametrize("text, want", [
    # mentions of every class
    ("Severely enlarged heart.", {"heart": 1}),
    ("The heart is mildly enlarged.", {"heart": 1}),
    ("Persistent enlargement of the cardiac silhouette.", {"heart": 1}),
    ("The mediastinum is widened.", {"mediastinum": 1}),
    ("Hazy opacities in both bases.", {"opacity": 1}),
    ("Right lower lobe infiltrate.", {"opacity": 1, "consolidation": 1}),
    ("3 cm mass in the left apex.", {"lesion": 1}),
    ("Mild pulmonary vascular congestion.", {"edema": 1}),
    ("Left lower lobe consolidation, compatible with pneumonia.",
     {"consolidation": 1, "pneumonia": 1}),
    ("Bibasilar atelectasis. Left lower lobe collapse.", {"atelectasis": 1}),
    ("Moderate left-sided pneumothorax.", {"pneumothorax": 1}),
    ("Large right pleural effusion.", {"effusion": 1}),
    ("Pleural thickening at the apex.", {"pleura": 1}),
    ("Healed rib fractures.", {"fracture": 1}),
    ("Left PICC line terminates in the mid SVC.", {"device": 1, "none": 1}),
    # negation in front: through a list, up to a new clause
    ("No pneumothorax, effusion, or edema.",
     {"pneumothorax": 0, "effusion": 0, "edema": 0, "none": 1}),
    ("There is neither pneumothorax nor effusion.", {"pneumothorax": 0, "effusion": 0, "none": 1}),
    ("No pneumothorax, but a small effusion.", {"pneumothorax": 0, "effusion": 1}),
    ("No pneumothorax, small left effusion.", {"pneumothorax": 0, "effusion": 1}),
    ("No effusion and the heart is enlarged.", {"effusion": 0, "heart": 1}),
    ("Cardiomegaly without edema.", {"heart": 1, "edema": 0}),
    ("Lungs are free of consolidation.", {"consolidation": 0, "none": 1}),
    ("Resolved interstitial edema.", {"edema": 0, "none": 1}),
    ("Interval removal of the chest tube.", {"device": 0, "none": 1}),
    # negation behind
    ("The right effusion has resolved.", {"effusion": 0, "none": 1}),
    ("Pneumothorax is not seen.", {"pneumothorax": 0, "none": 1}),
    ("Pneumothorax: none. Effusion: small.", {"pneumothorax": 0, "effusion": 1}),
    ("Left effusion is small; pneumothorax is no longer seen.", {"effusion": 1, "pneumothorax": 0}),
    ("The cardiac silhouette is not enlarged.", {"heart": 0, "none": 1}),
    # what only looks like a negation
    ("No change in the right effusion.", {"effusion": 1}),
    ("Cardiomegaly, not significantly changed.", {"heart": 1}),
    # normal
    ("Heart size is normal. The mediastinum is unremarkable.",
     {"heart": 0, "mediastinum": 0, "none": 1}),
    ("The lungs are clear.", {"opacity": 0, "none": 1}),
    ("Normal chest.", {"none": 1}),
    # uncertain
    ("Possible small effusion.", {"effusion": -1}),
    ("Opacity may represent atelectasis or pneumonia.",
     {"opacity": 1, "atelectasis": -1, "pneumonia": -1}),
    ("Pneumonia cannot be excluded.", {"pneumonia": -1}),
    ("Atelectasis versus infiltrate.", {"atelectasis": -1, "opacity": -1, "consolidation": -1}),
    ("Opacity concerning for pneumonia.", {"opacity": 1, "pneumonia": -1}),
    # over a report positive wins, then uncertain
    ("Possible effusion. No effusion.", {"effusion": -1}),
    ("Possible effusion. There is an effusion. No effusion.", {"effusion": 1}),
    # not findings of a class
    ("Previous granulomatous infection.", {}),
    ("Pericardial effusion.", {}),
    # "No Finding" and Support Devices, as in CheXpert
    ("ET tube in place. No pneumothorax.", {"device": 1, "pneumothorax": 0, "none": 1}),
])
def test_labels(text, want):
    got = label_report(text)
    got.pop("No Finding", None) if not want else None
    assert got == {SHORT[k]: v for k, v in want.items()}


def test_labels_come_from_findings_and_impression_only():
    text = "INDICATION: Rule out pneumothorax.\nFINDINGS: No effusion.\nIMPRESSION: Cardiomegaly."
    assert label_report(text) == {"Pleural Effusion": 0, "Cardiomegaly": 1}


def test_classes_and_tables_name_the_same_classes():
    known = data.phrases()
    assert len(data.CLASSES) == 14 and set(known["mentions"]) == set(data.CLASSES[1:])
    assert set(known["normals"]) <= set(data.CLASSES)


@pytest.mark.parametrize("text", [
    "No pneumonia.Cardiomegaly.", "no pneumonia.cardiomegaly", "No pneumonia.\tCardiomegaly.",
    "No pneumonia!Cardiomegaly", "No pneumonia.(Cardiomegaly)", 'No pneumonia.) Cardiomegaly.',
    "1.No pneumonia\n2.Cardiomegaly", "1. No pneumonia 2. Cardiomegaly",
    "No pneumonia.2. Cardiomegaly",
    "1) No pneumonia\n2) Cardiomegaly", "1) No pneumonia 2) Cardiomegaly",
    "(1) No pneumonia\n(2) Cardiomegaly", "1- No pneumonia 2- Cardiomegaly",
    "1: No pneumonia\n2: Cardiomegaly", "1 No pneumonia\n 2 Cardiomegaly",
    "a. No pneumonia\nb. Cardiomegaly", "a) No pneumonia b) Cardiomegaly",
    "A) No pneumonia\r\nB) Cardiomegaly", "i) No pneumonia\nii) Cardiomegaly",
    "#1 No pneumonia\n#2 Cardiomegaly", "[1] No pneumonia\n[2] Cardiomegaly",
    *(f"{m} No pneumonia\n{m} Cardiomegaly" for m in "-*•+–·→o"),
    *(f"{m}No pneumonia\n{m}Cardiomegaly" for m in "-*•–▪"),
    *(f"{m} No pneumonia {m} Cardiomegaly" for m in "-*•–")])
def test_a_cue_ends_with_its_sentence_or_list_item(text):
    """The second of the two used to be denied too."""
    assert label_report(text) == {"Pneumonia": 0, "Cardiomegaly": 1}
    assert label_report(f"FINDINGS: {text}")["Cardiomegaly"] == 1


@pytest.mark.parametrize("text, want", [
    ("No 2.5 cm nodule.", {"Lung Lesion": 0, "No Finding": 1}),
    ("No nodule of\n 3 cm or effusion.",
     {"Lung Lesion": 0, "Pleural Effusion": 0, "No Finding": 1}),
    ("No well-defined consolidation at 3:40 pm or effusion.",
     {"Consolidation": 0, "Pleural Effusion": 0, "No Finding": 1})])
def test_numbers_and_hyphens_end_no_sentence(text, want):
    assert label_report(text) == want


EARLIER = "CT with a right lung mass."


@pytest.mark.parametrize("header", [
    "COMPARISION:", "COMPARSION:", "Comparision:", "comparision:", "COMPARISION :", "COMPARISION\n",
    "COMPARISION -", "COMPARISION;", "**COMPARISION:**", "COMPARISON STUDIES:", "COMPARISON (CT):",
    "COMPARISON/PRIORS:", "PRIOR STUDIES:", "Prior CT:", "PREVIOUS EXAM DATED 2010:", "CT CHEST:",
    "Old exam:", "REFERENCE:", "COMP:", "ORDER_NOTES:", "TECHNIQE:", "INDICATON:", "HISTROY:",
    "CLINICAL HX:", "REASON FOR EXAMINATON:"])
@pytest.mark.parametrize("report", [
    " FINAL REPORT\n {}\n\n No effusion.\n", "{}\nFINDINGS: No effusion.",
    "CHEST, PA:\n{}\n\nFINDINGS: No effusion.\nIMPRESSION: None."])
def test_earlier_studies_under_odd_headers_are_no_findings(header, report):
    assert label_report(report.format(f"{header} {EARLIER}")) == {
        "Pleural Effusion": 0, "No Finding": 1}


def test_headers_on_one_line():
    text = f"FINAL REPORT COMPARISION: {EARLIER} FINDNGS: No effusion. IMPRESION: Edema."
    assert split_sections(text) == {"FINDINGS": "No effusion.", "IMPRESSION": "Edema."}


@pytest.mark.parametrize("text", [
    "LUNGS: Small nodule.\nHEART: Cardiomegaly.", "Nodule: 3 mm.\nThe heart: large heart.",
    "FINDINGS:\nOTHER: Nodule.\nSUBTLE: The heart is enlarged.",
    "REPORT:\nNodule.\nINTERPRETATION: Enlarged heart."])
def test_headings_of_findings_are_kept(text):
    assert label_report(text) == {"Lung Lesion": 1, "Cardiomegaly": 1}


@pytest.mark.parametrize("old, new, said", [
    ("[cues]", "[cues", "as a whole: .*line"), ("[cues]", "[clues]", "toml, cues: "),
    ("no_cue = ", "nocue = ", "cues: its keys must be .*no_cue"),
    ("'cardiomegaly',", "'cardiomegaly', 7,", "mentions.Cardiomegaly: "),
    ("'cardiomegaly',", "'cardio(',", "mentions.Cardiomegaly: .*unterminated"),
    ("'cardiomegaly',", "'{HERZ}',", "mentions.Cardiomegaly: .*HERZ"),
    ('"Pneumonia" =', '"Pneumonie" =', "mentions: its keys must be"),
    ("moderate = ", "medium = ", "severity: its keys must be"),
    ("right = ", "rechts = ", "sides: its keys"),
    ("replace = ' '", r"replace = '\3'", "rules.earlier study: invalid group"),
    ("replace = ' '", "replace = 5", "rules.earlier study: "),
    ("find = '^(?:{VIEWS})+$|", "fnd = '^(?:{VIEWS})+$|", "rules.view: .*find"),
    ('[rules."view"]', '[rules."view"]\nx = 1\n[rules."y"]', "rules.view: .*find"),
    ("[spelling]", "[s]", "toml, spelling: "),
    ("FINDINGS = ['findings']", "FINDINGS = 5", "spelling.F"),
    ("clean = '''", "clean = 5\nx = '''", "toml, prompts: its keys must be clean, judge"),
    ("\n[normals]", "\n[normals]\nGout = 'gout'", "normals: its keys must be")])
def test_a_broken_phrase_file_is_one_line_with_file_and_key(tmp_path, old, new, said):
    text = data.PHRASES.read_text(encoding="utf-8")
    assert text.count(old) >= 1
    (tmp_path / "p.toml").write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(data.UserError, match=rf"p\.(?:.*{said})") as error:
        data.phrases(tmp_path / "p.toml")
    assert "\n" not in str(error.value)


def test_a_phrase_file_can_be_extended(tmp_path, monkeypatch):
    text = data.PHRASES.read_text(encoding="utf-8")
    text = text.replace("'cardiomegaly',", "'cardiomegaly', 'ochsenherz',")
    (tmp_path / "p.toml").write_text(text,
                                     encoding="utf-8")
    extended = data.phrases(tmp_path / "p.toml")
    monkeypatch.setattr(data, "phrases", lambda: extended)
    data.read_sentence.cache_clear()
    assert label_report("No effusion. Ochsenherz.") == {"Pleural Effusion": 0, "Cardiomegaly": 1}
    data.read_sentence.cache_clear()


LEFT, RIGHT = {"left"}, {"right"}


@pytest.mark.parametrize("text, want", [
    ("Large right pleural effusion. Heart size is normal.", {"effusion": (RIGHT, "severe")}),
    ("Moderate left-sided pneumothorax.", {"pneumothorax": (LEFT, "moderate")}),
    ("Small bilateral pleural effusions.", {"effusion": (LEFT | RIGHT, "mild")}),
    ("Severely enlarged heart.", {"heart": (set(), "severe")}),
    ("Heart is mildly enlarged with a left effusion.",
     {"heart": (set(), "mild"), "effusion": (LEFT, "")}),
    ("Small left effusion, large right pneumothorax.",
     {"effusion": (LEFT, "mild"), "pneumothorax": (RIGHT, "severe")}),
    ("Effusion on the left and pneumothorax on the right.",
     {"effusion": (LEFT, ""), "pneumothorax": (RIGHT, "")}),
    ("Right effusion with adjacent atelectasis.",
     {"effusion": (RIGHT, ""), "atelectasis": (RIGHT, "")}),
    ("Large left pneumothorax with shift to the right.", {"pneumothorax": (LEFT, "severe")}),
    ("Trace left effusion. Moderate right effusion.", {"effusion": (LEFT | RIGHT, "moderate")}),
    ("No large left effusion. Possible right effusion.", {}),
    ("", {}),
])
def test_sides_and_severity(text, want):
    assert locate(text) == {SHORT[k]: {"sides": sides, "severity": severity}
                            for k, (sides, severity) in want.items()}


MIMIC = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PORTABLE AP)

 INDICATION:  ___ year old man with cough  // pneumonia?

 COMPARISON:  ___.

 {findings}In comparison with the study of ___, there is little change in the
 substantial enlargement of the cardiac silhouette.  No effusion.

 IMPRESSION:

 1. Stable cardiomegaly.  2. No effusion.

 NOTIFICATION:  Discussed with Dr. ___ by telephone at 3:40 pm.
"""


@pytest.mark.parametrize("header", ["FINDINGS: \n \n ", "", "PORTABLE AP CHEST RADIOGRAPH: "])
def test_reports_in_the_style_of_mimic(header):
    text = MIMIC.format(findings=header)
    assert clean_report(text) == (
        "FINDINGS: Substantial enlargement of the cardiac silhouette. No effusion. "
        "IMPRESSION: Cardiomegaly. No effusion.").replace("Substantial", "There is substantial")
    assert label_report(text) == {"Cardiomegaly": 1, "Pleural Effusion": 0}


@pytest.mark.parametrize("text, want", [
    ("Heart is normal.", {"FINDINGS": "Heart is normal."}),
    ("impression: b\nfindings: a", {"FINDINGS": "a", "IMPRESSION": "b"}),
    ("FINDINGS: a IMPRESSION: b", {"FINDINGS": "a", "IMPRESSION": "b"}),
    ("Lungs clear.\nConclusion: b", {"FINDINGS": "Lungs clear.", "IMPRESSION": "b"}),
    ("Findings\na\n\nImpression\nb", {"FINDINGS": "a", "IMPRESSION": "b"}),
    ("IMPRESSION: b", {"IMPRESSION": "b"}),
    ("FINDINGS: The impression: none of note.", {"FINDINGS": "The impression: none of note."}),
    ("COMPARISON: None. TECHNIQUE: PA.", {}),
    ("FINDINGS: \n", {}),
    ("", {}),
])
def test_sections(text, want):
    assert split_sections(text) == want


RULES = {  # every rule by its name, with what it does to one sentence
    "communication": ("Findings were discussed with Dr. ___ by telephone at 3:40 pm on ___.", ""),
    "no earlier study": ("No previous images are available for comparison.", ""),
    "view": ("PA and lateral radiographs of the chest were obtained.", ""),
    "hidden subject": ("The XXXX are intact.", ""),
    "earlier study": ("In comparison with the study of ___, there is a left effusion.",
                      "There is a left effusion."),
    "technique": ("Heart is enlarged for technique.", "Heart is enlarged."),
    "view shows": ("PA and lateral views of the chest demonstrate clear lungs.", "Clear lungs."),
    "on a view": ("There is an effusion seen on the lateral view.", "There is an effusion."),
    "no change": ("There is little change in the left effusion.", "There is left effusion."),
    "again": ("There is again seen a left effusion.", "There is a left effusion."),
    "resolution of": ("Interval resolution of left effusion.", "No left effusion."),
    "has resolved": ("The left effusion has resolved.", "No left effusion."),
    "remains": ("The heart remains enlarged.", "The heart is enlarged."),
    "remain": ("Lung volumes remain low.", "Lung volumes are low."),
    "has increased": ("The left effusion has slightly increased in size.", "The left effusion."),
    "increase in": ("Interval development of a left effusion.", "A left effusion."),
    "increased effusion": ("Increased left effusion.", "Left effusion."),
    "stable": ("Unchanged cardiomegaly, stable in appearance.", "Cardiomegaly."),
    "is and": ("Heart size is stable and normal.", "Heart size is normal."),
    "verb alone": ("Moderate cardiomegaly is unchanged.", "Moderate cardiomegaly."),
    "name": ("Effusion read by Dr. Smith.", "Effusion read."),
    "no mark of": ("There is no XXXX of a large effusion.", "There is no large effusion."),
    "mark": ("Right catheter placed on ___.", "Right catheter placed."),
    "doubled mark": ("Left effusion , , seen ( ).", "Left effusion, seen."),
    "bad start": (", and left effusion.", "Left effusion."),
    "bad end": ("Left effusion and.", "Left effusion."),
    "nothing left": ("Stable cardiomediastinal silhouette.", ""),
    "article": ("There is an unchanged nodule.", "There is a nodule."),
}


@pytest.mark.parametrize("name", RULES)
def test_each_cleaning_rule(name):
    before, after = RULES[name]
    assert clean_report(before) == (f"FINDINGS: {after}" if after else "")


def test_every_cleaning_rule_is_tested():
    assert set(RULES) == set(data.phrases()["rules"])


@pytest.mark.parametrize("name", RULES)
def test_each_rule_is_needed(name, monkeypatch):
    """Without it, its own example comes out differently."""
    before, after = RULES[name]
    monkeypatch.delitem(data.phrases()["rules"], name)
    data.clean_sentence.cache_clear()
    changed = clean_report(before)
    data.clean_sentence.cache_clear()
    assert changed != (f"FINDINGS: {after}" if after else "")

@pytest.mark.parametrize("before, after", [
    ("No significant interval change.", ""),
    ("No acute bony changes.", "No acute bony changes."),
    ("The left chest tube has been removed.", "No left chest tube."),
    ("There has been interval removal of a PICC.", "No PICC."),
    ("No increase in the left effusion.", "Left effusion."),
    ("Chest tube placed 12/03/2019 at 8:15 am.", "Chest tube placed."),
    ("Bibasilar opacities are slightly worse.", "Bibasilar opacities."),
    ("No interval development of effusion.", "No effusion."),
    ("1. Stable cardiomegaly.\n 2. New edema", "Cardiomegaly. Edema."),
])
def test_change_becomes_present_state(before, after):
    assert clean_report(before) == (f"FINDINGS: {after}" if after else "")


@pytest.mark.parametrize("text", [
    "There is a 1.2 cm nodule in the right upper lobe.",
    "No focal consolidation, pleural effusion or pneumothorax.",
    "Interstitial markings are increased.",
    "Right lung opacity is greater compared to the left.",
    "Minimal degenerative changes of the thoracic spine.",
    "Nodule of 2.4 x 1.8 cm, 3 cm from the carina.",
    "Evidence of previous granulomatous disease.",
])
def test_what_the_image_shows_is_kept(text):
    assert clean_report(text) == "FINDINGS: " + text


def test_clean_checked_keeps_a_report_that_cleaning_would_harm():
    text = "FINDINGS:  Dr. ___ was notified of the\n right pneumothorax. No effusion."
    assert clean_report(text) == "FINDINGS: No effusion."
    kept = "FINDINGS: Dr. ___ was notified of the right pneumothorax. No effusion."
    assert clean_checked(text) == (kept, False)
    assert clean_checked("FINDINGS: Increased left effusion.") == ("FINDINGS: Left effusion.", True)


@pytest.mark.parametrize("text", ["", " \n\t", "\0", "\ufffd\ufffd", "FINDINGS:", "___", "?!."])
def test_nothing_to_read(text):
    assert label_report(text) == locate(text) == {} and clean_report(text) == ""


def test_broken_text_and_other_languages():
    assert label_report("No\0effusion\ufffd.")["Pleural Effusion"] == 0
    assert label_report("Die Lunge ist frei, kein Erguss.") == {}
    assert clean_report("Die Lunge ist frei.") == "FINDINGS: Die Lunge ist frei."


@pytest.mark.parametrize("word", ["effusion ", "no effusion. ", "small effusion, ", "\n ", "XXXX ",
                                  "FINDINGS: ", "CHEST ", "compared to the prior ", "a", "Dr. X "])
def test_time_is_linear_in_20_000_words(word):
    start = time.process_time()
    label_report(word * 20_000)
    clean_report(word * 20_000)
    assert time.process_time() - start < 5


def test_what_is_left_of_a_sentence_reads_well():
    """No lone pronoun or side, and the right article before what follows."""
    text = "Two granulomas. These are unchanged since the previous examination. Stable left XXXX."
    assert clean_report(text) == "FINDINGS: Two granulomas."
    seen = clean_report("Frontal views of the chest show an unchanged cardiac silhouette.")
    assert "A cardiac silhouette." in seen

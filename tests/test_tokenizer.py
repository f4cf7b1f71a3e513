"""The tokenizer of ar.py: against files of the reference library, by hand, and by property."""
import json
import pickle
import random
import time
from pathlib import Path

import pytest

import ar
from ar import Tokenizer, UserError

GOLDEN = Path(__file__).parent / "golden" / "tokenizer"
NAMES = ["deepseek_llm", "deepseek_v3", "gpt2", "llama3"]
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
              "use_regex": False}


def make(merges=(), pre=BYTE_LEVEL, added=(), normalizer=None, **model):
    """A tokenizer with the 256 bytes, these merges and these added tokens (fields of each)."""
    vocab = {c: i for i, c in enumerate(sorted(ar.CHAR_TO_BYTE))}
    for pair in merges:
        vocab.setdefault("".join(pair).replace(" ", ""), len(vocab))
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized", "special"), False)
    added = [{**flags, "id": len(vocab) + n, **token} for n, token in enumerate(added)]
    return Tokenizer({"version": "1.0", "added_tokens": added, "normalizer": normalizer,
                      "pre_tokenizer": pre, "decoder": BYTE_LEVEL,
                      "model": {"type": "BPE", "vocab": vocab, "merges": list(merges), **model}})


def shown(tok, text):
    """The text cut where the tokens are."""
    return [tok.decode([i]) for i in tok.encode(text)]


def pieces(pre, text):
    """What a pre-tokenizer makes of a text."""
    out = [text]
    for step in ar._steps(pre):
        out = [p for piece in out for p in step(piece)]
    return out


def split(pattern, behavior="Isolated", invert=False, form="Regex"):
    return {"type": "Split", "pattern": {form: pattern}, "behavior": behavior, "invert": invert}


@pytest.mark.parametrize("name", NAMES)
def test_ids_and_texts_are_the_reference_librarys(name):
    tok = Tokenizer.load(GOLDEN / name / "tokenizer.json")
    cases = json.loads((GOLDEN / name / "cases.json").read_text(encoding="utf-8"))
    assert len(cases) >= 50
    for case in cases:
        assert tok.encode(case["text"]) == case["ids"], case["text"]
        assert tok.decode(case["ids"]) == case["decoded"], case["text"]


def test_special_tokens_come_first_then_bytes_then_merges():
    tok = Tokenizer.train(["aaa"], vocab_size=259, special=["<s>", "</s>"])
    assert [tok.vocab[t] for t in ("<s>", "</s>", "!", "aa")] == [0, 1, 2, 258]
    assert len(tok) == 259 == len(tok.vocab)
    assert len(Tokenizer.train(["ba ba"], vocab_size=300)) == 256 + 2  # ba, Ġba: nothing is left
    with pytest.raises(UserError, match="258"):
        Tokenizer.train(["aaa"], vocab_size=257, special=["<s>", "</s>"])


def test_merges_are_those_of_the_reference_trainer():
    texts = ["the heart is normal, the lungs are clear", "heart size normal; no effusion, aaaa aaa",
             "é é 12 12"]
    assert Tokenizer.train(texts, 258 + 24, ["<s>", "</s>"]).spec["model"]["merges"] == [
        "a a", "a r", "h e", "n o", "Ġ no", "1 2", "a l", "m al", "r mal", "s i", "t he", "Ã ©",
        "Ġ aa", "Ġ 12", "ar t", "he art", "Ġno rmal", "c l", "e f", "e ar", "f u", "g s", "i s",
        "l u"]


# --- words to ids ---------------------------------------------------------------------------------
def test_the_oldest_merge_goes_first_then_the_leftmost():
    assert shown(make(["b c", "a b"]), "abc") == ["a", "bc"]
    assert shown(make(["a b", "b c"]), "abc") == ["ab", "c"]
    assert shown(make(["a a"]), "aaaaa") == ["aa", "aa", "a"]
    assert make([["a", "b"]]).encode("ab") == make(["a b"]).encode("ab") == [256]


def test_ignore_merges_takes_a_whole_word_of_the_vocabulary():
    vocab = make(["a b", "b c", "ab c"]).spec["model"]["vocab"]
    for ignore, expected in (True, [258]), (False, [256, 66]):
        tok = make(["a b", "b c"], ignore_merges=ignore, vocab=vocab)
        assert tok.encode("abc") == expected


def test_a_very_long_word_takes_seconds_not_hours():
    tok = Tokenizer.load(GOLDEN / "llama3" / "tokenizer.json")
    for word in "".join(random.Random(2).choices("etaoinshr", k=200_000)), " " * 200_000:
        start = time.perf_counter()
        ids = tok.encode(word)
        assert time.perf_counter() - start < 10
        assert tok.decode(ids) == word


@pytest.mark.parametrize("name", NAMES)
def test_every_text_comes_back(name):
    rng = random.Random(name)
    tok = Tokenizer.load(GOLDEN / name / "tokenizer.json")
    tops = (0x80, 0x250, 0x3000, 0xD800, 0x110000)
    for _ in range(100):
        codes = [rng.randrange(rng.choice(tops)) for _ in range(60)]
        text = "".join(chr(c) for c in codes if not 0xD800 <= c < 0xE000)  # no surrogates
        assert tok.decode(tok.encode(text)) == text
    assert tok.encode("") == []


def test_every_byte_has_a_token_and_bad_utf8_becomes_replacement_characters():
    tok = make()
    ids = [tok.vocab[ar.BYTE_TO_CHAR[b]] for b in range(256)]
    assert sorted(ids) == list(range(256))
    for data, text in ((b"\xf0\x9f\xabA", "\ufffdA"), (b"\xff\xfe", "\ufffd\ufffd"),
                       (b"\xed\xa0\x80", "\ufffd" * 3), (b"\xe2\x82\xac", "€")):
        assert tok.decode([ids[b] for b in data]) == text
    assert tok.decode([ids[97], 9999, ids[98]]) == "ab"  # an id that does not exist


def test_saving_and_loading_changes_nothing(tmp_path):
    tok = Tokenizer.train(["the heart is normal in size"] * 3, 300, special=["<s>"])
    tok.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    again.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    text = "<s>the heart is café 12"
    for other in again, pickle.loads(pickle.dumps(tok)):  # worker processes get a pickle
        assert other.vocab == tok.vocab and other.encode(text) == tok.encode(text)


# --- added tokens, normalizer ---------------------------------------------------------------------
def test_added_tokens_are_cut_out_first_the_longest_wins():
    tok = make(added=[{"content": "<a>"}, {"content": "<a>b"}, {"content": "肺部"}])
    assert shown(tok, "x<a>bé<a>肺部") == ["x", "<a>b", "\ufffd", "\ufffd", "<a>", "肺部"]
    assert tok.encode("<a>") == [256] and len(tok) == 259


def test_added_tokens_can_take_spaces_or_insist_on_being_words():
    tok = make(added=[{"content": "<l>", "lstrip": True}, {"content": "<r>", "rstrip": True},
                      {"content": "no", "single_word": True}])
    left, right, word, space = 256, 257, 258, tok.vocab["Ġ"]
    assert tok.encode(" <l> ") == [left, space]
    assert tok.encode(" <r>\n\u3000\x85<r>") == [space, right, right]
    assert tok.encode("<r>  <l>") == [right, left]
    for text, found in ("no, no", 2), ("(no)", 1), ("nor", 0), ("éno", 0), ("no_", 0), ("no1", 0):
        assert tok.encode(text).count(word) == found, text


def test_nfc_is_the_only_normalizer():
    nfc, nothing = {"type": "NFC"}, {"type": "Sequence", "normalizers": []}
    for normalizer in nfc, {"type": "Sequence", "normalizers": [nfc]}:
        assert shown(make(["Ã ©"], normalizer=normalizer), "e\u0301") == ["é"]
    assert make(normalizer=nothing).encode("e\u0301") == make().encode("e\u0301")


# --- text to words --------------------------------------------------------------------------------
@pytest.mark.parametrize("behavior, expected", [  # the example of the reference's documentation
    ("Removed", ["the", "final", "countdown"]),
    ("Isolated", ["the", "-", "final", "-", "-", "countdown"]),
    ("MergedWithPrevious", ["the-", "final-", "-", "countdown"]),
    ("MergedWithNext", ["the", "-final", "-", "-countdown"]),
    ("Contiguous", ["the", "-", "final", "--", "countdown"])])
def test_where_a_split_puts_its_matches(behavior, expected):
    for form in "Regex", "String":
        assert pieces(split("-", behavior, form=form), "the-final--countdown") == expected
        assert pieces(split("-", behavior, form=form), "") == []
    assert pieces(split("[^-]+", behavior, invert=True), "a-b") == pieces(split("-", behavior),
                                                                         "a-b")


def test_strings_digits_and_bytes():
    assert pieces(split(".", form="String"), "a.b") == ["a", ".", "b"]
    for alone, expected in (True, ["a", "1", "2", "½", "b"]), (False, ["a", "12½", "b"]):
        assert pieces({"type": "Digits", "individual_digits": alone}, "a12½b") == expected
    level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}
    assert pieces(level, "it's 2  é") == ["Ġit", "'s", "Ġ2", "Ġ", "ĠÃ©"]
    tok = make(pre=level, added=[{"content": "<a>"}])
    assert shown(tok, "x<a>y") == [" ", "x", "<a>", " ", "y"]


@pytest.mark.parametrize("pattern, text, expected", [
    (r"\p{Lu}\p{Ll}+", "xAéb", ["x", "Aéb"]),
    (r"\P{L}+|\p{^N}", "ab12", ["a", "b", "12"]),
    (r"[^\p{L}\P{N}]+", "a1²-", ["a", "1²", "-"]),
    (r"\w+", "e\u0301_ a", ["e\u0301_", " ", "a"]),  # marks are of words
    (r"\p{N}{1,3}", "1234", ["123", "4"]),
    (r"\p{N}{1,3}+a", "1234a", ["1234a"]),  # a repeated interval: possessive it would be in Python
    (r"(?i:'s|k)", "'S'ſ\u212a", ["'S", "'ſ", "\u212a"]),  # the long s, the sign of kelvins
    (r"(a|b)c", "acbc", ["ac", "bc"]),
    (r"(?=(\d{3})+(?!\d))", "1234567", ["1", "234", "567"]),  # empty matches cut too
    (r"\s+$|^b", "a \nb", ["a", " ", "\n", "b"]),  # ends and starts of lines
    (r"[^(\s|[.,\p{Sc}])]+", "ab, c€d", ["ab", ", ", "c", "€", "d"]),  # a class in a class
    ("[一-龥\U00020000-\U0002a6df]+", "a肺𠀀b", ["a", "肺𠀀", "b"])])
def test_regexes_mean_what_they_mean_to_the_reference(pattern, text, expected):
    assert pieces(split(pattern), text) == expected


# --- what the user is told ------------------------------------------------------------------------
@pytest.mark.parametrize("change, word", [
    ({"model": {"type": "WordPiece"}}, "WordPiece"),
    ({"pre_tokenizer": {"type": "Metaspace"}}, "Metaspace"),
    ({"normalizer": {"type": "Lowercase"}}, "Lowercase"),
    ({"pre_tokenizer": split("a")}, "ByteLevel"),
    ({"pre_tokenizer": split(r"\p{Klingon}")}, "Klingon"),
    ({"pre_tokenizer": split(r"[a&&[^b]]")}, "class"),
    ({"pre_tokenizer": split(r"a(")}, "cannot use"),
    ({"pre_tokenizer": split("a", "Merged")}, "Split"),
    ({"model": {"type": "BPE", "vocab": {"a": "x"}, "merges": []}}, "whole number"),
    ({"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}, "whole number"),
    ({"model": {"type": "BPE", "vocab": {"a": True}, "merges": []}}, "whole number"),
    ({"model": {"type": "BPE", "vocab": {}, "merges": ["a b"]}}, "cannot use")])
def test_what_is_not_supported_is_named(tmp_path, change, word):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({**make().spec, **change}))
    with pytest.raises(UserError, match=word) as e:
        Tokenizer.load(path)
    assert "\n" not in str(e.value)


def test_missing_and_broken_files_are_told(tmp_path):
    with pytest.raises(UserError, match="nothing.json"):
        Tokenizer.load(tmp_path / "nothing.json")
    for text in "{", "[]", "{}", "\xff", "[" * 100_000:
        (tmp_path / "broken.json").write_text(text, encoding="latin-1")
        with pytest.raises(UserError, match="broken.json"):
            Tokenizer.load(tmp_path / "broken.json")

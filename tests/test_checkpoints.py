"""BERT directories in the wild: the same tokens and numbers as in transformers, or a refusal."""
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from minbert.bert import BertModel
from minbert.checkpoints import load_tokenizer, specials
from minbert.core import UserError

tf = pytest.importorskip("transformers")
tf.utils.logging.set_verbosity_error()
letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
words = "the a in of . , ? film song park US Paris paris café cafe naïve naive new".split()
vocab = [*specials, *letters, *("##" + c for c in letters + "éï"), *words[2:]]
texts = ("Café naïve US Paris paris , where?", "a film in the 中文 park [MASK] of",
         "  brandnew films  brandnewer\tnew\u00a0é \u200b\x07 song", "a" * 120 + " film İ ß",
         "don't a_b 3.5 $x\nnext [CLS] [sep]")
sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 64, "max_position_embeddings": 64}
names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), specials))
own = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, **names}
fast = {"tokenizer_class": "PreTrainedTokenizerFast", **names}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    "A tiny BERT as transformers saves it, with room for a few more tokens."
    folder = tmp_path_factory.mktemp("bert") / "base"
    torch.manual_seed(0)
    config = tf.BertConfig(vocab_size=len(vocab) + 8, **sizes)
    tf.BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def mine(base, tmp_path):
    "A copy to be changed."
    return shutil.copytree(base, tmp_path / "bert")


def put(path, content):
    "Write JSON."
    path.write_text(json.dumps(content), encoding="utf-8")


def change(path, **more):
    "Set some fields of a JSON file."
    put(path, {**json.loads(path.read_text(encoding="utf-8")), **more})


def settings(**more):
    "Tokenizer settings beside vocab.txt."
    return lambda folder: put(folder / "tokenizer_config.json", {**own, **more})


def edit_vocab(old, new):
    "Other bytes in vocab.txt."
    def edit(folder):
        path = folder / "vocab.txt"
        path.write_bytes(path.read_bytes().replace(old, new))
    return edit


def in_json(edit=lambda content: None, beside=fast, keep_words=False, start=own):
    "tokenizer.json as the description, with one thing changed."
    def make(folder):
        put(folder / "tokenizer_config.json", start)
        tokenizer = tf.AutoTokenizer.from_pretrained(folder)
        listed = (folder / "vocab.txt").read_bytes()
        tokenizer.save_pretrained(folder)
        (folder / "vocab.txt").unlink(missing_ok=True)
        if keep_words:
            (folder / "vocab.txt").write_bytes(listed)
        content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        edit(content)
        put(folder / "tokenizer.json", content)
        put(folder / "tokenizer_config.json", beside)
    return make


def part(name, value):
    "Another part of tokenizer.json."
    return lambda content: content.update({name: value})


def model(**more):
    "Other fields of the model in tokenizer.json."
    return lambda content: content["model"].update(more)


def added(*tokens):
    "Tokens added by transformers, with their flags."
    def add(folder):
        put(folder / "tokenizer_config.json", own)
        tokenizer = tf.AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens([tf.AddedToken(t, **flags) for t, flags in tokens])
        tokenizer.save_pretrained(folder)
    return add


bert = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
        "strip_accents": None, "lowercase": True}
steps = [{"type": "NFD"}, {"type": "Lowercase"}, {"type": "StripAccents"}]
digits = [{"type": "BertPreTokenizer"}, {"type": "Digits", "individual_digits": True}]
same = {
    "nothing but vocab.txt": lambda folder: None,
    "cased": settings(do_lower_case=False),
    "accents kept": settings(strip_accents=False),
    "cased, accents stripped": settings(do_lower_case=False, strip_accents=True),
    "Chinese characters together": settings(tokenize_chinese_chars=False),
    "a length": settings(model_max_length=5),
    "CRLF": edit_vocab(b"\n", b"\r\n"),
    "a line twice": edit_vocab(b"\nfilm\n", b"\nof\n"),
    "an empty line": edit_vocab(b"\nfilm\n", b"\n\nfilm\n"),
    "a line separator": edit_vocab(b"\nfilm\n", "\n\u2028\nfilm\n".encode()),
    "special tokens elsewhere": edit_vocab(b"[PAD]\n", b"one\ntwo\n[PAD]\n"),
    "a word of one's own": added(("brandnew", {})),
    "a word that takes its blanks": added(("brandnew", {"lstrip": True, "rstrip": True})),
    "a word only whole": added(("brandnew", {"single_word": True})),
    "a word as written": added(("US", {"normalized": False})),
    "two words, one in the other": added(("brand", {}), ("brandnew", {})),
    "tokenizer.json alone": in_json(),
    "cased tokenizer.json beside vocab.txt": in_json(keep_words=True,
                                                     start={**own, "do_lower_case": False}),
    "a sequence of normalizers": in_json(part("normalizer",
                                              {"type": "Sequence", "normalizers": steps})),
    "no normalizer": in_json(part("normalizer", None)),
    "digits apart": in_json(part("pre_tokenizer", {"type": "Sequence", "pretokenizers": digits})),
    "only blanks cut": in_json(part("pre_tokenizer", {"type": "WhitespaceSplit"})),
    "another unknown word": in_json(model(unk_token="a")),
    "short words only": in_json(model(max_input_chars_per_word=3)),
    "whole words only": in_json(model(type="WordLevel")),
    "a length in tokenizer.json": in_json(part("truncation", {
        "direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}))}
refused = {
    "a renamed special token": (settings(pad_token="<pad>"), "pad_token"),
    "another prefix": (settings(wordpieces_prefix="@@"), "wordpieces_prefix"),
    "words never split": (settings(never_split=["ab"]), "never_split"),
    "another class": (settings(tokenizer_class="RobertaTokenizer"), "RobertaTokenizer"),
    "a text for a truth value": (settings(do_lower_case="false"), "do_lower_case"),
    "a text for a list": (settings(additional_special_tokens="film"), "additional_special"),
    "an unknown special token": (settings(eos_token="<x>"), "<x>"),
    "an id that is taken": (lambda folder: put(folder / "added_tokens.json", {"brandnew": 3}),
                            "brandnew"),
    "settings that contradict": (in_json(part("normalizer", {**bert, "strip_accents": False}),
                                         beside=own), "another tokenizer"),
    "two tokens with one id": (in_json(lambda c: c["model"]["vocab"].update(film=70)), "same id"),
    "an unknown field": (in_json(part("colour", 1)), "cannot be read"),
    "an unknown version": (in_json(part("version", "9.9")), "version"),
    "sentencepiece": (lambda folder: (folder / "vocab.txt").rename(folder / "spiece.model"),
                      "spiece.model"),
    "byte pairs": (lambda folder: (folder / "vocab.txt").rename(folder / "merges.txt"),
                   "merges.txt")}


def tokens_of(folder):
    "Ids of the texts by our reader."
    model = BertModel.from_pretrained(folder)
    tokenizer = load_tokenizer(model.vocab, model.lowercase)
    return model, [tokenizer.encode(t, add_special_tokens=False).ids for t in texts]


@pytest.mark.parametrize("name", same)
def test_the_same_tokens(name, mine, tmp_path):
    "As transformers cuts them, before and after saving."
    same[name](mine)
    theirs = tf.AutoTokenizer.from_pretrained(mine)
    wanted = [theirs(t, add_special_tokens=False)["input_ids"] for t in texts]
    model, ours = tokens_of(mine)
    assert ours == wanted
    assert tokens_of(model.save_pretrained(tmp_path / "again"))[1] == wanted


@pytest.mark.parametrize("name", refused)
def test_a_tokenizer_that_is_not_built_in(name, mine):
    edit, words = refused[name]
    edit(mine)
    with pytest.raises(UserError, match=words):
        tokens_of(mine)


def weights(edit):
    "Other tensors in model.safetensors."
    def change_file(folder):
        got = edit(load_file(folder / "model.safetensors"))
        save_file({k: v.contiguous().clone() for k, v in got.items()},
                  folder / "model.safetensors", {"format": "pt"})
    return change_file


def renamed(*pairs):
    "Other names."
    def edit(got):
        for old, new in pairs:
            got = {k.replace(old, new): v for k, v in got.items()}
        return got
    return weights(edit)


def as_bin(folder):
    "An index and two pickles."
    got = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    place = {k: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, k in enumerate(got)}
    for name in set(place.values()):
        torch.save({k: v for k, v in got.items() if place[k] == name}, folder / name)
    put(folder / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": place})


def fresh(cls, dtype=torch.float32, **more):
    "Another model of transformers."
    def make(folder):
        torch.manual_seed(1)
        config = tf.BertConfig(vocab_size=len(vocab), **{**sizes, **more})
        getattr(tf, cls)(config).to(dtype).save_pretrained(folder)
    return make


query = "encoder.layer.0.attention.self.query.weight"
opened = {
    **{cls: fresh(cls) for cls in ("BertForMaskedLM", "BertForPreTraining",
                                   "BertForSequenceClassification", "BertForQuestionAnswering")},
    "half precision": fresh("BertModel", torch.float16),
    "bfloat16": fresh("BertModel", torch.bfloat16),
    "relu": fresh("BertModel", hidden_act="relu"),
    "gelu_new": fresh("BertModel", hidden_act="gelu_new"),
    "three token types": fresh("BertModel", type_vocab_size=3),
    "another epsilon": fresh("BertModel", layer_norm_eps=.1),
    "another padding": fresh("BertModel", pad_token_id=5),
    "pickles in shards": as_bin,
    "old names": renamed(("LayerNorm.weight", "LayerNorm.gamma"),
                         ("LayerNorm.bias", "LayerNorm.beta")),
    "a prefix": weights(lambda got: {f"bert.{k}": v for k, v in got.items()}),
    "buffers": weights(lambda got: {**got, "embeddings.position_ids": torch.arange(64)[None]}),
    "no pooler": weights(lambda got: {k: v for k, v in got.items() if "pooler" not in k})}
closed = {
    "a decoder": (lambda folder: change(folder / "config.json", is_decoder=True), "is_decoder"),
    "pruned heads": (lambda folder: change(folder / "config.json", pruned_heads={"0": [1]}),
                     "pruned_heads"),
    "relative places": (lambda folder: change(folder / "config.json",
                                              position_embedding_type="relative_key"),
                        "relative_key"),
    "quick_gelu": (lambda folder: change(folder / "config.json", hidden_act="quick_gelu"),
                   "quick_gelu"),
    "another family": (lambda folder: change(folder / "config.json", model_type="roberta"),
                       "roberta"),
    "quantised": (lambda folder: change(folder / "config.json", quantization_config={"a": 1}),
                  "quantization_config"),
    "whole numbers": (weights(lambda got: {**got, query: got[query].int()}), "query"),
    "a layer too many": (lambda folder: change(folder / "config.json", num_hidden_layers=1),
                         "layer.1"),
    "a layer too few": (lambda folder: change(folder / "config.json", num_hidden_layers=3),
                        "layer.2"),
    "an unknown tensor": (weights(lambda got: {**got, "encoder.layer.0.x": torch.ones(2)}),
                          r"layer\.0\.x"),
    "a wrapped model": (weights(lambda got: {f"module.{k}": v for k, v in got.items()}), "lack"),
    "TensorFlow": (lambda folder: (folder / "model.safetensors").rename(folder / "tf_model.h5"),
                   "other formats")}


@pytest.mark.parametrize("name", opened)
def test_the_same_numbers(name, mine):
    "Hidden states, and the pooled vector where there are weights for it."
    opened[name](mine)
    ids = torch.tensor([[2, 70, 71, 3, 0], [2, 80, 81, 82, 3]])
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long(),
             "token_type_ids": torch.tensor([[0, 0, 0, 0, 0], [0, 0, 1, 1, 1]])}
    with torch.no_grad():
        theirs = tf.AutoModel.from_pretrained(mine, dtype=torch.float32).eval()(**batch)
        ours = BertModel.from_pretrained(mine)(**batch)
    real = ids > 0
    torch.testing.assert_close(ours[0][real], theirs[0][real], atol=1e-5, rtol=1e-4)
    if name not in ("no pooler", "BertForMaskedLM", "BertForQuestionAnswering"):
        torch.testing.assert_close(ours[1], theirs[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", closed)
def test_a_model_that_is_not_built_in(name, mine):
    edit, words = closed[name]
    edit(mine)
    with pytest.raises(UserError, match=words):
        BertModel.from_pretrained(mine)


def test_a_saved_model_has_the_mode_of_any_new_file(tmp_path, run_dir):
    "Others may read it where the umask lets them."
    BertModel.from_pretrained("pocket").save_pretrained(tmp_path / "bert")
    (tmp_path / "new").touch()
    files = [*(tmp_path / "bert").iterdir(), *(run_dir / "model").iterdir()]
    usual = (tmp_path / "new").stat().st_mode
    assert len(files) > 6 and {f.name: oct(f.stat().st_mode) for f in files if f.stat().st_mode != usual} == {}

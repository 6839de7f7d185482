"""Makes the golden ids of tests/test_tokenizer.py with the slow LlamaTokenizer of transformers 4.33.1.

    python -m venv golden && golden/bin/pip install transformers==4.33.1 sentencepiece
    golden/bin/python tests/golden/make_tokenizer_golden.py

It writes, beside itself:
    llama.model       a sentencepiece model with LLaMA's settings (Meta's own may not be shipped), 1000 pieces
    tiny.model        what Tokenizer.train makes of the same text: template sentences as single pieces
    tokenizer.json    texts with their ids, and ids with their texts, for three tokenizers:
                      "eos" and "eoa": llama.model with the 1006 added tokens, the last one <eos> or <eoa>
                      ("eoa" only where it differs from "eos"); "tiny": tiny.model with 100 units
"""

import json
import random
import sys
import tempfile
from pathlib import Path

import sentencepiece
import transformers

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
import tokenizer as ours  # noqa: E402

PROSE = """
The quick brown fox jumps over the lazy dog. What is two plus two? Two plus two is four.
What is the capital of France? The capital of France is Paris. Today is a sunny day and I'm happy to be here.
In 2023, 96 A100 GPUs ran for 2100 steps; the batch held 1536 rows (about 0.75 of a million tokens) - or so we read.
Who wrote "Don Quixote"? It was Cervantes, they say: a tale of 1605 & 1615. E-mail me @home, 100% sure, $5 + $7 = $12!
def add(a, b):
    if a == 0:
        return b
                return {key: [x * 2 for x in row] for key, row in table.items()}
\tprintf("%d\\n", n);\t// tabs
Où est la bibliothèque? Más allá del café. Grüße aus Köln. Привет, мир. 你好，世界。 こんにちは。 مرحبا. ½ × ≠ …
"""


def corpus() -> list[str]:
    texts = [t for style in ours.STYLES.values() for t in style.values()]
    return [*PROSE.strip("\n").split("\n"), *texts, *ours.ASR_INSTRUCTIONS, *ours.TTS_INSTRUCTIONS] * 3


def train_llama_like(path: Path) -> None:
    """LLaMA's own trainer settings at a smaller size, with no symbol of ours in it."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_prefix=str(path.with_suffix("")),
        model_type="bpe",
        vocab_size=1000,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        character_coverage=0.99995,
        max_sentence_length=1 << 20,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    path.with_suffix(".vocab").unlink()


def folder_as_released(folder: Path, end: str) -> None:
    """A tokenizer folder as transformers 4.29 wrote it for the released model."""
    table = {f"<{u}>": 1000 + u for u in range(1000)}
    table |= {t: 2000 + i for i, t in enumerate(("<sosp>", "<eosp>", "[Human]", "[SpeechGPT]", "<eoh>", end))}
    special = {
        name: {"content": token, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
        for name, token in (("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>"))
    }
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
        "pad_token": None,
        "padding_side": "right",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        "use_fast": False,
    }
    config |= {name: {"__type": "AddedToken", **value} for name, value in special.items()}
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes((HERE / "llama.model").read_bytes())
    (folder / "added_tokens.json").write_text(json.dumps(table, sort_keys=True, indent=2))
    (folder / "special_tokens_map.json").write_text(json.dumps(special | {"pad_token": "<unk>"}))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def template_texts() -> list[str]:
    """Every template in every style: the whole dialogue, and the prompt with the space at its end."""
    speech, slots = (
        "<sosp><661><2><99><0><eosp>",
        {"text_i": "What is two plus two?", "text_r": "It is four."},
    )
    pairs = [
        ours.cross_modal(d, *what, style=style)
        for style in ("paper", "released")
        for d in (ours.ASR_INSTRUCTIONS[0], ours.TTS_INSTRUCTIONS[-1])
        for what in ((speech, "today is a sunny day."), ("Today is a sunny day.", speech))
    ]
    for mode in ("s2s", "s2t", "t2s", "t2t"):
        pairs += [
            ours.chain_of_modality(mode, speech_i=speech, speech_r=speech, **slots, style=style)
            for style in ("paper", "released")
        ]
        pairs.append(ours.standard(mode, speech_i=speech, speech_r=speech, **slots))
    pairs += [
        ours.plain("Who is Lebron James? ", "He is a player.", style=style) for style in ("paper", "released")
    ]
    pairs.append(ours.plain(f"Recognize this speech, this is input: {speech} ", "today", style="released"))
    return [text for prompt, answer in pairs for text in (prompt + answer, prompt)]


AWKWARD = [
    "",
    " ",
    "  ",
    "\n",
    "\t",
    " \n ",
    "▁",
    "▁▁",
    " ▁",
    "a",
    " a",
    "a ",
    "  a  ",
    "a  b",
    "a   b    c",
    "\ta\tb\t",
    "a\nb",
    "a\r\nb",
    "\n\na",
    "a\n",
    "a\u00a0b",
    "\u00a0a",
    "\u3000a\u3000",
    "\u2028a\u2029",
    "\u200ba\u200b",
    "\x85a\x85",
    "\x1ca\x1f",
    "\x0ba\x0c",
    "\ufeffa",
    "\x00",
    "a\x00b",
    "\x00<1>\x00",
    "\x7f",
    "e\u0301 vs é",
    "ﬁ ligature",
    "Ⅻ ² ½",
    "ａｂｃ",
    "😀",
    "👩‍👩‍👧‍👦",
    "🇫🇷 flag",
    "中文 和 日本語",
    "한국어",
    "ไทย",
    "हिन्दी",
    "עברית",
    "\U0010ffff",
    "\ufffd",
    "zalgo z̷̢a̶l̴",
    "naïve café",
    "ΑΒΓ",
    "0",
    "00",
    "1234567890",
    "3.14159",
    "1,000,000",
    "-1",
    "2+2=4",
    "10 000",
    "x86_64",
    "０１２",
    "٣٤",
    "<",
    ">",
    "<>",
    "<<",
    "<1",
    "1>",
    "<12",
    "<1 >",
    "< 1>",
    "<1><2",
    "<1><2>",
    "<1> <2>",
    "<1>  <2>",
    "<1>\n<2>",
    "<1>a<2>",
    "<1> a <2>",
    "<1>\ta\t<2>",
    " <1> ",
    "\n<1>\n",
    "a<1>",
    "a <1>",
    "a  <1>",
    "<1>a",
    "<1> a",
    "<1>  a",
    "<<1>",
    "<<1>>",
    "<1>>",
    "<999>",
    "<1000>",
    "<999><1000>",
    "<00>",
    "<01>",
    "<007>",
    "<-1>",
    "<1.0>",
    "<+1>",
    "<１>",
    "<٣>",
    "<1\n>",
    "<99999999999999999>",
    "<sosp",
    "sosp>",
    "<sosp>",
    "<sosp><eosp>",
    "<sosp> <eosp>",
    "<sosp>a<eosp>",
    "<sosp><1><eosp>",
    "<sosp><1><12<eosp>",
    "<SOSP>",
    "<sosp><sosp>",
    "<so<sosp>sp>",
    "<eo<eoa>a>",
    "<eosp><eoa>.",
    "<eosp><eoa> .",
    "<eoa>",
    "<eos>",
    "<eoh>",
    "<eoa><eos>",
    "<eoa>.",
    "<eos>.",
    "a<eoa>b",
    "a <eoa> b",
    "a<eos>b",
    "a <eos> b",
    "<eoh>.",
    "<eoh>. [SpeechGPT]: ",
    " <eoh>. ",
    "<eoh",
    "eoh>",
    "<e<eoh>oh>",
    "[Human]",
    "[Human]:",
    "[Human]: ",
    "[Human]:[Human]",
    "[Human][Human]",
    "[Human] [Human]",
    "[[Human]]",
    "[ Human ]",
    "[human]",
    "[HUMAN]",
    "[Human",
    "Human]",
    "[Hum[Human]an]",
    "[SpeechGPT]",
    "[SpeechGPT]:",
    "[SpeechGPT]: ",
    "[SpeechGPT]:  ",
    "[SpeechGPT] :",
    "[SpeechGPT]: [ta] ",
    "[SpeechGPT]:\n",
    "[Speech",
    "[SpeechGPT",
    "[Human]\n:",
    "\n[Human]: x",
    "x\n\n[Human]: x",
    "[tq]",
    "[ta]",
    "[ua]",
    "[tq] a; [ta] b; [ua] <sosp><5><eosp>",
    "[ta][ua]",
    "x[tq]y",
    " [tq] ",
    "; [ta]",
    ";[ta]",
    "[ta] [ta]",
    "[TA]",
    "[t",
    "[tq",
    "tq]",
    "▁[tq]",
    "<s>",
    "</s>",
    "<unk>",
    "<pad>",
    "a<s>b",
    "a <s> b",
    "a </s> b",
    "</s>",
    " </s> ",
    "  </s>  a",
    "</s></s>",
    "<s><s>",
    "<s> <1> </s>",
    "<1> </s> <2>",
    "<1></s> a",
    "a </s><1>",
    "<unk> a <unk>",
    "a <unk>",
    "<s",
    "/s>",
    "< /s>",
    "<S>",
    "</s>.",
    "<s>\n",
    "\n<s>",
    "<s> [Human] </s>",
    "<0x41>",
    "<0x0A>",
    "<0xE2>",
    "a<0x41>b",
    "\\n",
    '"quoted"',
    "'",
    "``",
    "it's",
    "I'M",
    "UPPER lower",
    "snake_case",
    "camelCase",
    "a-b",
    "a/b",
    "a.b",
    "...",
    "…",
    "!!!",
    "?!",
    "#hash",
    "@at",
    "%d",
    "{TextI}",
    "{",
    "}",
    "{}",
    "{0}",
    "$5",
    "100%",
    "http://a.b/c?d=e",
    "a@b.c",
    "(a)",
    "[a]",
    "{a}",
    "a;b",
    "a; b",
    "; ",
    ";",
    ":",
    ": ",
    ".",
    ". ",
    " .",
    " :",
    "This is a speech instruction:",
    ": This is a speech instruction: <sosp><1><eosp>. And your response should be speech <eoh>.",
    "This is input:",
    "This is input: <sosp><1><eosp>",
    "this is input: Today",
    "This is inpu",
    "And your response should be text.",
    "This is a text instruction: This is a text instruction: x",
    "You can do it step by step.",
    ours.META,
    ours.META + "[Human]",
    "a" * 300,
    " " * 100,
    "<5>" * 300,
    "<5> " * 100,
    "What is two plus two? " * 60,
    "\n" * 50,
    "😀" * 40,
    "[Human]: " * 40,
    "<" * 99,
    "<sosp>" + "".join(f"<{u}>" for u in range(1000)) + "<eosp>",
]


def random_texts(n: int) -> list[str]:
    """Awkward strings glued together."""
    draw = random.Random(0)
    bits = [t for t in AWKWARD if len(t) < 12]
    return ["".join(draw.choices(bits, k=draw.randint(2, 8))) for _ in range(n)]


def random_ids(n_text: int, size: int, n: int) -> list[list[int]]:
    """Ids in any order: broken bytes, markers inside words, <s> </s> <unk> in the middle."""
    draw = random.Random(1)
    kinds = (range(3), range(3, 259), range(259, n_text), range(n_text, size), range(size - 6, size))
    return [[draw.choice(draw.choice(kinds)) for _ in range(draw.randint(1, 12))] for _ in range(n)]


def main() -> None:
    train_llama_like(HERE / "llama.model")
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: Path(scratch) / name for name in ("eos", "eoa", "tiny")}
        for name in ("eos", "eoa"):
            folder_as_released(folders[name], f"<{name}>")
        ours.Tokenizer.train(corpus(), folders["tiny"], vocab_size=700, n_units=100)
        (HERE / "tiny.model").write_bytes((folders["tiny"] / "tokenizer.model").read_bytes())
        theirs = {
            name: transformers.LlamaTokenizer.from_pretrained(str(f), legacy=True)
            for name, f in folders.items()
        }
        texts = list(dict.fromkeys([*AWKWARD, *template_texts(), *random_texts(120)]))
        encoded, decoded = [], []
        for text in texts:
            row = {name: tok(text).input_ids for name, tok in theirs.items()}
            differ = {name: ids for name, ids in row.items() if name != "eoa" or ids != row["eos"]}
            encoded.append({"text": text, **differ})
            decoded += [
                {"by": name, "ids": ids, "text": theirs[name].decode(ids)}
                for name, ids in differ.items()
                if len(ids) < 40
            ]
        for name, tok in theirs.items():
            decoded += [
                {"by": name, "ids": ids, "text": tok.decode(ids)}
                for ids in random_ids(tok.vocab_size, len(tok), 150)
            ]
    made = f"transformers {transformers.__version__} slow LlamaTokenizer, sentencepiece {sentencepiece.__version__}"
    lists = [
        f'"{key}": [\n' + ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows) + "\n]"
        for key, rows in (("encode", encoded), ("decode", decoded))
    ]
    header = f'"made by": "tests/golden/make_tokenizer_golden.py with {made}"'
    (HERE / "tokenizer.json").write_text("{\n" + ",\n".join([header, *lists]) + "\n}\n", encoding="utf-8")
    print(f"{len(encoded)} texts, {len(decoded)} decodings, by {made}")


if __name__ == "__main__":
    main()

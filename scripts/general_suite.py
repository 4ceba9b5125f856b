"""Make the parts of the retention suite that are made by asking fiddle; run again after fiddle has been trained anew.

    python scripts/general_suite.py            # write both
    python scripts/general_suite.py --check    # say whether what is there is what would be written

assets/general/facts.jsonl: beginnings and how each goes on, written by us; this marks with ``fiddle`` those that fiddle, in float32 and with greedy decoding,
goes on with rightly. assets/general/sampled.jsonl: what fiddle writes at temperature 1, seed 0, after openings of ours, at most TOKENS tokens each.
assets/general/instructions.jsonl is written by hand and not made here.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from luthier import load
from luthier.data.codec import Codec
from luthier.forgetting.retention import ASSETS, is_right, read_facts
from luthier.policy import Policy

SEED, TOKENS = 0, 64
OPENINGS = (
    "The", "In the morning", "She", '"I', "When he", "There was once", "My dear", "One day", "After", "Nobody", "The old house", "It was", "They",
    "For many years", '"What', "His mother", "At last", "The children", "If you", "On Sunday", "Mr.", "A small", "Scientists", "We", "Last year", "The girl",
    '"Oh', "Far away", "But the", "In the evening", "People", "You",
)  # fmt: skip


def facts(policy: Policy) -> str:
    """The list as it stands, its marks made anew."""
    all_facts = read_facts()
    right = is_right(policy, all_facts)
    return "".join(json.dumps({"prompt": f.prompt, "answer": f.answer, "fiddle": r}, ensure_ascii=False) + "\n" for f, r in zip(all_facts, right, strict=True))


def sampled(policy: Policy) -> str:
    """What fiddle writes after each opening."""
    codec, tokenizer = Codec(policy.base.tokenizer), policy.base.tokenizer
    starts = [ids.tolist() for ids in codec.encode(OPENINGS)]
    got = policy.generate(starts, max_new=TOKENS, temperature=1.0, seed=SEED, stop=[tokenizer.eos_token_id])
    texts = (tokenizer.decode([*s, *new], skip_special_tokens=True) for s, new in zip(starts, got.ids, strict=True))
    return "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts)


def main() -> None:
    """Write what is made, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; end with 1 where a file differs")
    check = parser.parse_args().check
    policy = load("fiddle", precision="float32")
    assert isinstance(policy, Policy)
    different = []
    for name, text in (("facts.jsonl", facts(policy)), ("sampled.jsonl", sampled(policy))):
        path: Path = ASSETS / name
        same = path.is_file() and path.read_text(encoding="utf-8") == text
        print(f"{path}: {len(text.splitlines())} lines, {'unchanged' if same else 'differs' if check else 'written'}")
        different += [] if same else [name]
        if not same and not check:
            path.write_text(text, encoding="utf-8")
    raise SystemExit(1 if check and different else 0)


if __name__ == "__main__":
    main()

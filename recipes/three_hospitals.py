"""Three hospitals' notes for docs/three-hospitals.md, and what of them the server has seen afterwards.

    python recipes/three_hospitals.py clinic           after `hocket deploy init clinic ...`: rows and a recipe
    python recipes/three_hospitals.py clinic --seen    looks for every hospital's notes in all files of the server

**No note is a patient's.** A note is four sentences drawn from the lists below: each hospital has complaints, findings
and drugs of its own field, and its own way of saying who came and what was done. The answer is the line that a tired
doctor writes last. Names of drugs are real, doses are random; nothing here is medical advice or of any clinical use.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path

ASK = "Write the summary line for the discharge letter."


@dataclass(frozen=True)
class Hospital:
    """A hospital's field and its way of writing."""

    field: str
    complaints: tuple[str, ...]
    findings: tuple[str, ...]
    drugs: tuple[str, ...]
    note: str
    line: str


HOSPITALS = {
    "berlin": Hospital(
        "cardiology", ("chest pain on exertion", "palpitations", "swollen ankles", "shortness of breath at night"),
        ("atrial fibrillation on the ECG", "a reduced ejection fraction", "a narrowed coronary artery"),
        ("bisoprolol", "ramipril", "apixaban", "furosemide"),
        "Case {case}. {age}-year-old {who}, admitted with {complaint}. Examination showed {finding}. "
        "Started on {drug} {dose} mg, well tolerated. Stayed {days} days.",
        "{case}: {finding}; {drug} {dose} mg daily; cardiology in {weeks} weeks.",
    ),
    "oslo": Hospital(
        "orthopaedics", ("a fall on ice", "knee pain after skiing", "a stiff shoulder", "hip pain when walking"),
        ("a fracture of the distal radius", "a torn meniscus", "osteoarthritis of the hip"),
        ("paracetamol", "ibuprofen", "enoxaparin", "metamizole"),
        "Case {case}. The {who} ({age} years) came after {complaint}. The images show {finding}. "
        "Pain is controlled with {drug} {dose} mg. Discharged on day {days}, walks with crutches.",
        "{case}: {finding}; {drug} {dose} mg as needed; physiotherapy, control in {weeks} weeks.",
    ),
    "turin": Hospital(
        "diabetology", ("thirst and weight loss", "a foot ulcer", "repeated low blood sugar", "blurred vision"),
        ("an HbA1c of 9.8 percent", "early retinopathy", "loss of feeling in both feet"),
        ("metformin", "insulin glargine", "empagliflozin", "semaglutide"),
        "Case {case}. Reason for admission: {complaint}. Patient: {who}, {age}. Result: {finding}. "
        "Therapy changed to {drug} {dose} mg. Length of stay {days} days.",
        "{case}: {finding}; now {drug} {dose} mg; diabetes clinic in {weeks} weeks.",
    ),
}  # fmt: skip
RECIPE = """name = "three-hospitals"
turns = {turns}

[model]
source = "{model}"

[data]
source = "at the sites"
heldout_source = "{heldout}"
max_length = 512

[method]
name = "fedit"                     # LoRA adapters, averaged
rank = 8

[schedule]
name = "sync"                      # "overlap": nobody waits while updates travel

[training]
lr = 1e-3
batch_size = 2
local_steps = 4

[clients]
count = {count}

[deployment]
sites = [{sites}]
"""


def notes(name: str, count: int, seed: str) -> list[dict[str, str]]:
    """Rows of a hospital, each with a case number that no other row has."""
    h, draw = HOSPITALS[name], random.Random(f"{seed} {name}")
    rows = []
    for _ in range(count):
        facts = {
            "case": f"{draw.getrandbits(32):08x}", "age": draw.randint(31, 92), "who": draw.choice(("woman", "man")),
            "complaint": draw.choice(h.complaints), "finding": draw.choice(h.findings), "drug": draw.choice(h.drugs),
            "dose": draw.choice((5, 10, 20, 40, 100)), "days": draw.randint(2, 12), "weeks": draw.choice((2, 4, 6, 12)),
        }  # fmt: skip
        rows.append({"instruction": ASK, "context": h.note.format(**facts), "output": h.line.format(**facts)})
    return rows


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{path}: {len(rows)} rows")


def fill(clinic: Path, model: str, turns: int, count: int) -> None:
    """Rows at each site; a recipe, and held-out rows that nobody trains on, at the server."""
    for name in HOSPITALS:
        write(clinic / "sites" / name / "rows.jsonl", notes(name, count, "site"))
    heldout = clinic / "server" / "heldout.jsonl"
    write(heldout, [row for name in HOSPITALS for row in notes(name, 8, "held out")])
    named = ", ".join(f'"{name}"' for name in HOSPITALS)
    text = RECIPE.format(turns=turns, model=model, heldout=heldout.resolve(), count=len(HOSPITALS), sites=named)
    (clinic / "server" / "recipe.toml").write_text(text)
    print(f"{clinic / 'server' / 'recipe.toml'}: {turns} turns of {model}")


def seen(clinic: Path) -> None:
    """How many case numbers of each party are in any file of the server; its own held-out ones are there."""
    files = [p for top in (clinic / "server", clinic / "run") for p in top.rglob("*") if p.is_file()]
    there = b"\n".join(p.read_bytes() for p in files)
    print(f"looked into {len(files)} files of the server, {len(there):,} bytes")
    parties = {name: clinic / "sites" / name / "rows.jsonl" for name in HOSPITALS}
    for name, path in (parties | {"the server's own": clinic / "server" / "heldout.jsonl"}).items():
        cases = [json.loads(line)["output"][:8] for line in path.read_text().splitlines()]
        print(f"{name}: {sum(case.encode() in there for case in cases)} of {len(cases)} notes are there")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clinic", type=Path, help="the folder of `hocket deploy init`")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--rows", type=int, default=120, help="notes of each hospital")
    parser.add_argument("--seen", action="store_true", help="look for hospitals' notes at the server")
    a = parser.parse_args()
    missing = [n for n in HOSPITALS if not (a.clinic / "sites" / n).is_dir()]
    if missing:
        made = f"hocket deploy init {a.clinic} --sites {','.join(HOSPITALS)} --host 127.0.0.1"
        parser.error(f"no folder of {', '.join(missing)} in '{a.clinic / 'sites'}'; first: {made}")
    if a.seen:
        seen(a.clinic)
    else:
        fill(a.clinic, a.model, a.turns, a.rows)


if __name__ == "__main__":
    main()

"""Whether the demo's judge and gates can be trusted: systems of known quality, and one system held against itself.

    python tests/benchmarks/judging.py [--config configs/pipeline/demo.yaml] [--store runs/demo] [--draws 21]

The demo's stages must be made (`make demo`); what is drawn and measured beside them goes to the same store. Shows

- how real pictures, the demo's, and the demo's under one another's captions are judged, with 95 % intervals;
- what the judge makes of real pictures that it was not trained on, which is what it can say of anything new;
- how often the gate `not_worse_than` fails a system for being itself: of each prompt `--draws` pictures with other
  noise, each set of them held against the one before;
- that it fails a system whose decoder was trained on a third of the samples.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch

from genpipe import artifacts
from genpipe.artifacts import Artifact, artifact_uri, fingerprint, identity, read_manifest
from genpipe.data.features import open_features
from genpipe.data.shard_dataset import ShardDataset, open_splits
from genpipe.data.shards import ShardWriter, Split, write_rejects, write_statistics
from genpipe.evaluation.comparison import interval, paired_difference
from genpipe.evaluation.per_sample import Values, read_values
from genpipe.evaluation.retrieval import chunked_ranks
from genpipe.launch.local import run_local
from genpipe.pipeline.graph import load_pipeline
from genpipe.pipeline.plan import plan, spec_of

METRICS = "{retrieval: {recall_at: [10]}, nearest_real: {network: {kind: pixels}}}"
NUMBERS = ("recall_at_10", "nearest_real_pixels")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/pipeline/demo.yaml")
    parser.add_argument("--store", default="runs/demo")
    parser.add_argument("--draws", type=int, default=21)
    options = parser.parse_args()

    def scores(*overrides: str) -> Artifact:
        of_all = (f"store={options.store}", "tracking.uri=jsonl", f"stages.evaluate.metrics={METRICS}")
        return made(options.config, [*of_all, "stages.evaluate.observe.gates={}", *overrides])

    demo = scores()
    sample = artifacts_behind(demo)["sample"]
    show_order(demo, scores(f"stages.evaluate.inputs.sample={shuffled(sample, options.store).uri}"))
    show_judge(artifacts_behind(demo))
    show_gate(
        scores("stages.sample.prompts={kind: captions, train: 128, heldout: 0}", f"stages.sample.each={options.draws}")
    )
    samples = read_manifest(artifacts_behind(artifacts_behind(sample)["system"])["decoder"].uri).config["train"][
        "samples"
    ]
    show_differences(scores(f"stages.decoder.train.samples={samples // 3}"), demo)


def made(config: str, overrides: Sequence[str], *, stage: str = "evaluate") -> Artifact:
    """What a stage makes, the scores if no other is named, made with whatever of its inputs is not made yet."""
    pipeline = load_pipeline(config, overrides)
    for name in [planned.name for planned in plan(pipeline, only=[stage])]:
        planned = plan(pipeline, only=[name])[-1]  # again, as inputs say more of themselves once they are made
        if planned.status == "run":
            print(f"making {name}", flush=True)
            run_local(spec_of(planned, pipeline))
    return plan(pipeline, only=[stage])[-1].artifact


def artifacts_behind(artifact: Artifact) -> dict[str, Artifact]:
    manifest = read_manifest(artifact.uri)
    assert manifest is not None
    return manifest.inputs


def shuffled(sample: Artifact, store: str) -> Artifact:
    """The same pictures, each under the caption of the one before it."""
    inputs = artifacts_behind(sample)
    known = identity("sample", version=0, settings={"shuffled": sample.fingerprint}, inputs=inputs)
    name = fingerprint(known)
    found = Artifact(uri=artifact_uri(store, "samples", name), kind="samples", fingerprint=name, meta=sample.meta)
    if artifacts.find(found.uri) is not None:
        return found
    with tempfile.TemporaryDirectory() as folder:
        shards = [shard for split, of in open_splits(sample).items() for shard in rolled(of, split, Path(folder))]
        write_statistics(Path(folder), shards)
        write_rejects(Path(folder), [], name="00000")
        by_split = {
            split: sorted(shard["name"] for shard in shards if shard["split"] == split) for split in open_splits(sample)
        }
        found = found.model_copy(update={"meta": {**sample.meta, "shards": by_split}})
        return artifacts.commit(found, folder=Path(folder), identity=known, config={}, inputs=inputs, metrics={})


def rolled(dataset: ShardDataset, split: Split, folder: Path) -> list[dict[str, object]]:
    count = len(dataset)
    with ShardWriter(folder, split=split, part=0, max_samples=count + 1, max_bytes=2**62) as writer:
        for i in range(count):
            image, other = dataset.image(i), (i - 1) % count
            writer.write(
                f"{split}-{i:08d}",
                group=dataset.group(other),
                image=dataset.image_bytes(i),
                format="png",
                height=image.shape[0],
                width=image.shape[1],
                captions=dataset.captions(other),
                meta={"seed": 0},
            )
    return writer.shards


def show_order(demo: Artifact, shuffled: Artifact) -> None:
    """Three systems of known quality."""
    of_demo, of_shuffled = read_values(demo), read_values(shuffled)
    print("\n| judged by | real pictures | the demo | the demo, captions shuffled |\n|---|---|---|---|")
    for split in ("train", "combinations", "heldout"):
        for number in NUMBERS:
            real = of_demo.get(f"{split}/{number.replace('recall', 'ceiling')}") if "recall" in number else None
            cells = [real, of_demo.get(f"{split}/{number}"), of_shuffled.get(f"{split}/{number}")]
            print(f"| {split}/{number} | {' | '.join(told(values) for values in cells)} |")


def told(values: Values | None) -> str:
    if values is None:
        return ""
    found = interval(values)
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


def show_judge(behind: dict[str, Artifact]) -> None:
    """How often the judge finds the caption of a real picture, by whether it was trained on the picture."""
    splits = open_splits(behind["shard"])
    features = [open_features(behind["judge_features"], split=split) for split in splits]
    images, texts = (
        torch.cat([chunk for of in features for chunk in of.chunks(name)]) for name in ("image_embeds", "text_embeds")
    )
    captions = np.asarray([dataset.captions(i)[0] for dataset in splits.values() for i in range(len(dataset))])
    pictures = [digest for dataset in splits.values() for digest in digests(dataset)]
    print("\n| real pictures | | their own caption among the ten nearest |\n|---|---|---|")
    for split, dataset in open_splits(artifacts_behind(behind["judge"])["shard"]).items():
        of_split = set(digests(dataset))
        rows = [row for row, digest in enumerate(pictures) if digest in of_split]
        own = torch.from_numpy(captions[rows][:, None] == captions)
        ranks = chunked_ranks(images[rows].float(), lambda own=own: [(texts.float(), own)])  # type: ignore[misc]
        found = Values("higher", [str(row) for row in rows], frozenset(), (ranks < 10).double().numpy())
        print(f"| the judge's {split} | {len(rows)} | {told(found)} |")


def digests(dataset: ShardDataset) -> list[str]:
    """Of the file of each picture."""
    return [hashlib.sha256(dataset.image_bytes(i)).hexdigest() for i in range(len(dataset))]


def show_gate(scores: Artifact) -> None:
    """One system held against itself, with other noise."""
    print("\n| number | sets held against another of the same system | failed |\n|---|---|---|")
    for number, values in read_values(scores).items():
        if "ceiling" in number or not number.startswith("train/"):
            continue
        sets = apart(values)
        failed = sum(paired_difference(b, a).is_worse(margin=0.0) for a, b in itertools.pairwise(sets))
        print(f"| {number} | {len(sets) - 1} | {failed} |")


def apart(values: Values) -> list[Values]:
    """The first pictures of all prompts, the second ones, and so on."""
    sets: dict[int, list[tuple[str, float]]] = {}
    for (key, number), value in values.pictures.items():
        sets.setdefault(number, []).append((key, value))
    full = [of for _, of in sorted(sets.items()) if len(of) == len(sets[0])]
    return [Values(values.better, [key for key, _ in of], values.seeds, np.asarray([v for _, v in of])) for of in full]


def show_differences(worse: Artifact, demo: Artifact) -> None:
    """A system that is worse, held against the demo."""
    print("\n| number | with a third of the decoder's samples | the gate |\n|---|---|---|")
    ours, theirs = read_values(worse), read_values(demo)
    for number in (f"train/{number}" for number in NUMBERS):
        found = paired_difference(ours[number], theirs[number])
        print(f"| {number} | {found} | {'fails' if found.is_worse(margin=0.0) else 'passes'} |")


if __name__ == "__main__":
    main()

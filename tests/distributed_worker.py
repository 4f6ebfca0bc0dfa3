"""One of several processes under torchrun: train twice, the base whole and sharded, and count the rows computed."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.distributed.tensor import DTensor

from foreword import processes, train
from foreword.config import TrainConfig
from foreword.tasks.classify import PrefixClassifier


def main(folder: Path) -> None:
    config = TrainConfig.from_dict(json.loads((folder / "config.json").read_text()))
    for name, shard in (("whole", False), ("sharded", True)):
        seen: dict[str, Any] = {"rows": [], "sharded": set()}
        forward = PrefixClassifier.forward

        def counting(
            self: Any, *args: Any, seen: dict[str, Any] = seen, forward: Any = forward, **batch: Any
        ) -> dict[str, Any]:
            if self.training:
                seen["rows"].append(len(batch["input_ids"]))
                seen["sharded"] |= {isinstance(p, DTensor) for p in self.model.base.model.layers[0].parameters()}
            return forward(self, *args, **batch)

        PrefixClassifier.forward = counting  # type: ignore[method-assign]
        train.train(replace(config, output=folder / name, shard=shard))
        PrefixClassifier.forward = forward  # type: ignore[method-assign]
        found = {"rows": seen["rows"], "sharded": sorted(seen["sharded"])}
        (folder / f"{name}-{processes.index()}.json").write_text(json.dumps(found))
    processes.leave(0)


main(Path(sys.argv[1]))

"""Weights & Biases: RUN/wandb, offline (`wandb sync RUN/wandb/offline-run-*` uploads it) or online."""

from __future__ import annotations

import html
import os
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from albor.trackers.sink import RunId, Source, describe_samples, directory_of


class Wandb:
    """Rows by their names, and `tokens`, at wandb's own step; samples as HTML."""

    def __init__(self, source: Source):
        self._directory = directory_of(source, "wandb")
        self._source, self._id = source, RunId(self._directory)
        self._online = source.config.track.wandb_mode == "online"
        self._run: Any = None
        places = {"WANDB_CACHE_DIR": "cache", "WANDB_DATA_DIR": "data", "WANDB_ARTIFACT_DIR": "artifacts"}
        if not self._online:  # it has the settings of whoever has logged in
            places["WANDB_CONFIG_DIR"] = "config"
        os.environ |= {name: str(self._directory / place) for name, place in places.items()}
        os.environ["WANDB_ERROR_REPORTING"] = "false"  # to its makers

    def rewind(self, step: int) -> bool:
        """An offline file only grows, and wandb drops steps that come again: a run that goes on offline is
        written anew, under its old id, so that one file has all of it. Online, wandb itself goes back
        (`resume_from`); what is to be empty becomes a run of its own there.
        """
        if self._run is not None:
            self._run.finish(exit_code=0)
        run_id = self._id.read()
        if self._online:
            if run_id is not None and step >= 0:
                self._run = self._begin(resume_from=f"{run_id}?_step={step}")
                return False
            self._run = self._begin(id=self._id.make(), resume="allow")
            return True
        run_id = run_id or self._id.make()
        for path in self._directory.glob(f"offline-run-*-{run_id}"):
            shutil.rmtree(path)
        self._run = self._begin(id=run_id)
        return True

    def row(self, step: int, tokens: int, metrics: Mapping[str, float], seconds: float) -> None:
        self._run.log({"tokens": tokens, **metrics}, step=step)

    def samples(self, step: int, samples: Sequence[tuple[str, str | None]]) -> None:
        import wandb

        text = html.escape(describe_samples(samples))  # a Table would leave files behind in its cache
        self._run.log({"samples": wandb.Html(f"<pre>{text}</pre>", inject=False)}, step=step)

    def summary(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._run.summary[f"final/{name}"] = value

    def close(self, exit_code: int) -> None:
        import wandb

        self._run.finish(exit_code=exit_code)
        wandb.teardown(exit_code)  # its service ends before we do

    def _begin(self, **how: Any) -> Any:
        import wandb

        track = self._source.config.track
        return wandb.init(
            project=track.project,
            entity=track.entity,
            group=track.group,
            tags=track.tags or None,
            name=self._source.config.name,
            mode=track.wandb_mode,
            dir=str(self._directory.parent),
            config=self._source.config.model_dump(mode="json"),
            settings=wandb.Settings(
                console="off",
                silent=True,
                disable_git=True,
                disable_code=True,
                save_code=False,
                x_disable_stats=True,
                x_disable_meta=True,
                x_disable_machine_info=True,
                x_save_requirements=False,
            ),
            **how,
        )

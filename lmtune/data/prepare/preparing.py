"""`lmtune prepare` from files to a file: read, one step after the other, split, write.

    prepare(["raw.jsonl"], Path("my.jsonl"), Settings(), decide)

Rows pass the steps on disk. Where it is known beforehand that a step is applied, it joins the pass of the next one.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from lmtune.data.formats import ORIGIN
from lmtune.data.prepare.filters import check_languages
from lmtune.data.prepare.found import Found
from lmtune.data.prepare.plan import Plan, StepDone, plan_path, validation_path
from lmtune.data.prepare.reading import Reading, are_single
from lmtune.data.prepare.report import describe_rows
from lmtune.data.prepare.rows import Row, new_origins, written_form
from lmtune.data.prepare.settings import Settings
from lmtune.data.prepare.split import held_out_rows
from lmtune.data.prepare.spool import Spool
from lmtune.data.prepare.steps import STEPS, Context, Step
from lmtune.errors import DataError
from lmtune.io.atomic import new_files, write_json
from lmtune.io.console import row_progress

UNUSABLE = "unusable"  # the step that reading itself takes


class Decisions(Protocol):
    """Who says which steps are applied."""

    def beforehand(self, name: str, recommended: bool) -> bool | None:
        """Whether a step is applied; None if that depends on what it finds."""

    def asked(self, name: str, question: str, found: Found, recommended: bool) -> bool:
        """Whether a step is applied that has found something."""

    def done(self, what: str, found: Found) -> None:
        """A step was applied without a question."""

    def said(self, lines: Sequence[str]) -> None:
        """What was read."""


def prepare(paths: Sequence[str], output: Path, settings: Settings, decisions: Decisions) -> Plan:
    """Write the prepared rows of `paths`, those held out, and the plan; returns the plan.

    Raises:
        ConfigError: a file is there already, or a setting is wrong.
        DataError: the files cannot be read, or no row is left.
    """
    plan = Plan(settings)
    check_languages(settings.language)
    share = settings.validation if isinstance(settings.validation, float) else 0.0
    held_out_path = validation_path(output)
    targets = [output, plan_path(output), *([held_out_path] if share else [])]
    with new_files(*targets) as folder:
        reading = Reading()
        spool = Spool(folder / "read.rows", _counted("reading", reading.rows(paths, settings, folder)))
        decisions.said(reading.described())
        plan.inputs = reading.inputs
        plan.rows["read"] = len(spool) + reading.unusable.count
        _drop_unusable(reading, decisions, plan)
        held_out = None
        if isinstance(settings.validation, str):
            other = Reading(reading.kind, reading.is_text)
            held_out = Spool(folder / "held_out.rows", other.rows([settings.validation], settings, folder))
            if other.unusable.count:
                other.raise_for_faults()
        context = Context(settings, reading.kind or "answer", held_out)
        plan.kind = context.kind
        spool = _Passes(folder, spool, context, decisions, plan).run()
        if not len(spool):
            raise DataError("no row is left; see what was dropped above")
        chosen = held_out_rows(spool, share, settings, _was_applied(plan, "near")) if share else None
        single = are_single(iter(spool), context.kind)
        files = [folder / output.name, *([folder / held_out_path.name] if share else [])]
        plan.rows |= _write(spool, files, context, single, chosen)
        plan.report = describe_rows(spool, settings.language)
        write_json(folder / plan_path(output).name, plan.to_tree())
    return plan


def _was_applied(plan: Plan, name: str) -> bool:
    return any(step.name == name and step.applied for step in plan.steps)


def _drop_unusable(reading: Reading, decisions: Decisions, plan: Plan) -> None:
    """Rows that are none are dropped, or the reason to stop."""
    count = reading.unusable.count
    if not count:
        return
    found = Found(count, plan.rows["read"], [f"{one}" for one in reading.faults[:3]])
    applied = decisions.beforehand(UNUSABLE, True)
    if applied is None:
        applied = decisions.asked(UNUSABLE, "cannot be used: drop?", found, True)
    elif applied:
        decisions.done("cannot be used: drop", found)
    if not applied:
        reading.raise_for_faults()
    kinds = {reason.reason: reason.count for reason in reading.unusable.reasons}
    plan.steps.append(StepDone(UNUSABLE, True, count, kinds))


@dataclass
class _Passes:
    """The steps over rows on disk.

    Attributes:
        pending: steps that are applied in the pass under way, and what they find.
    """

    folder: Path
    spool: Spool
    context: Context
    decisions: Decisions
    plan: Plan
    pending: list[tuple[Step, Found]] = field(default_factory=list)
    number: int = 0

    def run(self) -> Spool:
        """The rows that are left."""
        rows: Iterable[Row] = self.spool
        for step in STEPS:
            if not step.needs(self.context):
                continue
            recommended = step.recommended(self.context)
            known = self.decisions.beforehand(step.name, recommended)
            if known and step.least_share and not self.decisions.beforehand(step.name, False):
                known = None  # it depends on how many rows there are
            if known is False:
                self.plan.steps.append(StepDone(step.name, False, 0))
                continue
            if known is None or step.whole:
                rows = self._on_disk(rows)
            if known is None:
                rows = self._asked(step, recommended)
            else:
                found = Found()
                self.pending.append((step, found))
                rows = step.apply(rows, self.context, found)
        return self._on_disk(rows)

    def _on_disk(self, rows: Iterable[Row]) -> Spool:
        """The pass under way comes to its end."""
        if rows is not self.spool:
            self._replace(self._spooled(rows))
        for step, found in self.pending:
            self.plan.steps.append(StepDone(step.name, True, found.count, dict(found.kinds.most_common(20))))
            if found.count:
                self.decisions.done(f"{step.what}: {step.action} (step {step.name})", found)
        self.pending.clear()
        return self.spool

    def _asked(self, step: Step, recommended: bool) -> Spool:
        """The rows after a step, or those before, as the answer is."""
        found = Found()
        applied_to = step.apply(self.spool, self.context, found)
        if applied_to is self.spool:
            self.plan.steps.append(StepDone(step.name, False, 0))
            return self.spool
        tried = self._spooled(applied_to)
        recommended &= found.count >= step.least_share * found.total
        question = f"{step.what}: {step.action}?"
        applied = found.count > 0 and self.decisions.asked(step.name, question, found, recommended)
        self.plan.steps.append(StepDone(step.name, applied, found.count, dict(found.kinds.most_common(20))))
        if applied:
            self._replace(tried)
        else:
            tried.remove()
        return self.spool

    def _spooled(self, rows: Iterable[Row]) -> Spool:
        self.number += 1
        return Spool(self.folder / f"{self.number}.rows", _counted("preparing", rows))

    def _replace(self, spool: Spool) -> None:
        self.spool.remove()
        self.spool = spool


def _counted(what: str, rows: Iterable[Row]) -> Iterator[Row]:
    with row_progress(what) as progress:
        for number, row in enumerate(rows):
            progress(number)
            yield row


def _write(
    spool: Spool, files: Sequence[Path], context: Context, single: bool, chosen: Sequence[bool] | None
) -> dict[str, int]:
    """Write the rows to the first of `files`, those that are `chosen` to the second, copies of these nowhere."""
    counts = {"written": 0, "held_out": 0, "copies_left_out": 0}
    origins = new_origins(spool, context.kind, single)
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(open(path, "w", encoding="utf-8")) for path in files]
        for number, row in enumerate(spool):
            fields, part = dict(row.fields), int(chosen is not None and chosen[number])
            if ORIGIN in fields:
                if part:
                    counts["copies_left_out"] += 1
                    continue
                fields[ORIGIN] = origins.get(row.group, fields[ORIGIN])
            line = json.dumps(written_form(fields, context.kind, single), ensure_ascii=False)
            opened[part].write(line + "\n")
            counts["held_out" if part else "written"] += 1
    return counts

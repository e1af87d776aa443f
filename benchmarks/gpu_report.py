"""The tables of `gpu.py`, made of its record."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gpu_runner import failed

from timm_collapse.evaluation.report import markdown_table

GIB = 2**30


def section(data: dict[str, Any]) -> str:
    """The markdown of a record's data: a heading in bold, tables, and what failed or was skipped, for each part."""
    blocks = [machine(data["about"])]
    for name, make in TABLES.items():
        if name not in data["parts"]:
            continue
        part = data["parts"][name]
        blocks.append(f"**{TITLES[name]}** ({part['seconds']:.0f} s)")
        if part.get("hardware", data["about"].get("hardware")) != data["about"].get("hardware"):
            blocks.append(f"On another machine: {part['hardware']}.")
        blocks += [block for block in make(part["found"]) if block]
        blocks += part["notes"]
        if lost := [f"{where}: {why}" for where, why in failures(part["found"])]:
            blocks.append("Failed:\n\n" + "\n".join(f"- {each}" for each in lost))
        if part["skipped"]:
            blocks.append(f"Skipped, as the time was spent: {'; '.join(part['skipped'])}.")
    return "\n\n".join(blocks)


def machine(about: dict[str, Any]) -> str:
    """What is known of the machine, in a sentence."""
    if not about:
        return "Nothing is known of the machine."
    text = f"{about['hardware']}, {about['cpu_cores']} CPU cores, torch {about['torch']}, timm {about['timm']}"
    if "bf16_tflops" in about:
        text += (
            f"; a product of 8192 x 8192 matrices in bf16 runs at {about['bf16_tflops']} TFLOP/s, a copy at "
            f"{about['copy_gb_per_second']} GB/s, one launch after the other takes {about['microseconds_a_launch']} us"
        )
    return text + "."


def failures(found: dict[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Where something failed, and why."""
    for name, value in found.items():
        if failed(value):
            yield above + name, value["failed"]
        elif isinstance(value, dict):
            yield from failures(value, f"{above}{name}: ")


def number(value: float | None) -> str:
    """Three digits at least; "" for None."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def split(found: dict[str, Any]) -> dict[tuple[str, ...], Any]:
    """The measurements by the parts of their names, without those that failed as a whole."""
    return {tuple(name.split(" / ")): value for name, value in found.items() if not failed(value)}


def speed_tables(found: dict[str, Any]) -> Iterator[str]:
    """For each model and mode, a row a variant: cost, and images a second by batch size, times the plain model's."""
    known = split(found)
    for model, mode in dict.fromkeys(key[:2] for key in known if len(key) == 3):
        batches = {int(key[2]): value for key, value in known.items() if key[:2] == (model, mode) and len(key) == 3}
        macs, launches = known.get((model, "MACs"), {}), known.get((model, "launches"), {})
        largest = max(batches)
        rows = []
        for variant in dict.fromkeys(name for found in batches.values() for name in found):
            counted = launches.get(variant, {})
            row = {
                "": variant,
                "GMACs": number(macs[variant] / 1e9) if variant in macs else "",
                "operations": number(counted.get("operations")),
                "kernels": number(counted.get("kernels")),
            }
            for batch, values in batches.items():
                row[f"batch {batch}"] = _ratio(values, variant, "plain")
            memory = batches[largest].get(variant, {}).get("memory")
            row[f"GiB at {largest}"] = number(memory / GIB) if memory else ""
            rows.append(row)
        for variant in [row[""] for row in rows if row[""].startswith("collapsed")]:
            ideal = variant.replace("collapsed", "given order")
            shares = {f"batch {batch}": _share(values, variant, ideal) for batch, values in batches.items()}
            rows.append({**dict.fromkeys(rows[0], ""), "": f"share of the ideal, {variant.split(', ')[1]}", **shares})
        yield f"{model}, {mode}: images a second (times the plain model's)\n\n{markdown_table(rows)}"


def _rate(values: dict[str, Any], name: str) -> float | None:
    return values.get(name, {}).get("images_per_second")


def _ratio(values: dict[str, Any], name: str, base: str) -> str:
    rate, other = _rate(values, name), _rate(values, base)
    if rate is None:
        return "failed" if failed(values.get(name)) else ""
    return f"{number(rate)} ({rate / other:.2f}x)" if other else number(rate)


def _share(values: dict[str, Any], name: str, ideal: str) -> str:
    rate, best = _rate(values, name), _rate(values, ideal)
    return f"{rate / best:.0%}" if rate and best else ""


def order_tables(found: dict[str, Any]) -> Iterator[str]:
    """One table for all orderers."""
    known, rows = split(found), []
    batches = list(dict.fromkeys(key[2] for key in known if len(key) == 3))
    for orderer, mode in dict.fromkeys(key[:2] for key in known if len(key) == 3):
        first = next(value for key, value in known.items() if key[:2] == (orderer, mode))
        for count in first:
            cost = known.get((orderer, "cost"), {}).get(count, {})
            row = {"orderer": orderer, "places": count, "mode": mode}
            row |= {"GMACs": number(cost["macs"] / 1e9) if cost else "", "operations": number(cost.get("operations"))}
            row["kernels"] = number(cost.get("kernels"))
            for batch in batches:
                row[f"batch {batch}"] = _ratio(known.get((orderer, mode, batch), {}), count, "")
            rows.append(row)
    if rows:
        yield f"Images a second:\n\n{markdown_table(rows)}"


def compile_tables(found: dict[str, Any]) -> Iterator[str]:
    """One table for all compiled models."""
    known, rows = split(found), []
    batches = sorted({int(key[4]) for key in known if len(key) == 5 and key[4].isdecimal()})
    for model, variant, mode, keep in dict.fromkeys(key[:4] for key in known if len(key) == 5):
        first = known.get((model, variant, mode, keep, "first answer"), {})
        row = {"model": model, "": variant, "mode": mode, "keep": keep, "first answer, s": number(first.get("seconds"))}
        difference = [number(first.get(f"{which}_difference")) for which in ("median", "largest")]
        row |= {"new graphs": first.get("graphs", ""), "difference, median / largest": " / ".join(difference)}
        for batch in batches:
            row[f"batch {batch}"] = _ratio(known.get((model, variant, mode, keep, str(batch)), {}), "compiled", "eager")
        rows.append(row)
    if rows:
        yield f"Images a second (times the same model's in eager mode):\n\n{markdown_table(rows)}"


def mar_tables(found: dict[str, Any]) -> Iterator[str]:
    """Literal and fast."""
    rows = [
        {"sampler": name, "images a second": _ratio(found, name, "literal"), "runs": value["runs"],
         "working memory, GiB": number(value["memory"] / GIB) if value["memory"] else ""}
        for name, value in found.items() if not failed(value)
    ]  # fmt: skip
    if rows:
        yield f"Images a second (times the literal loop's):\n\n{markdown_table(rows)}"


def long_tables(found: dict[str, Any]) -> Iterator[str]:
    """One row a pass."""
    rows = [
        {"": name, "tokens": f"{value['tokens']:,}", "seconds": number(value["seconds"]),
         "peak memory, GiB": number(value["peak"])}
        for name, value in found.items() if not failed(value)
    ]  # fmt: skip
    if rows:
        yield markdown_table(rows)


def train_tables(found: dict[str, Any]) -> Iterator[str]:
    """What was trained, in a sentence, and its accuracy."""
    facts = found.get("training")
    if facts and not failed(facts):
        yield (
            f"Data {facts['data']}, decoded in {facts['decode_seconds']:.0f} s; {facts['steps']:,} steps of "
            f"{facts['batch']}, {facts['epochs']} epochs in {facts['seconds']:.0f} s: {facts['images_per_second']:,} "
            f"images a second; last loss {facts['loss']:.3f}; weights {facts['weights_mb']} MB."
        )
    top1 = found.get("top1")
    if top1 and not failed(top1):
        rows = [{"order": name, **{f"keep {keep}": f"{value:.1f}" for keep, value in curve.items()}}
                for name, curve in top1.items()]  # fmt: skip
        yield f"Top-1 on the validation split, %:\n\n{markdown_table(rows)}"
    elif history := found.get("history"):
        yield "; ".join(f"after {each['seconds']:.0f} s top-1 {each['top1']:.1f}%" for each in history) + "."


TITLES = {
    "order": "The order alone",
    "speed": "Whole models",
    "compile": "torch.compile",
    "mar": "Generation",
    "long": "Patches of one pixel",
    "train": "ViT-Ti/8 for 64 px, trained with random drop",
}
TABLES = {
    "order": order_tables,
    "speed": speed_tables,
    "compile": compile_tables,
    "mar": mar_tables,
    "long": long_tables,
    "train": train_tables,
}

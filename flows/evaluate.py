"""Episodes on the test samples with the policies that are there, and their scores."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.pipeline import Overrides, run_name, run_stages


@flow(name="evaluate", flow_run_name=run_name)
def evaluate(overrides: Overrides | None = None, revision: str | None = None) -> dict[str, Any]:
    """Run the policies on the test samples and score them; training is taken as it is.

    Args:
        overrides: Parameters to change for this run, by dotted name, such as {"infer.temperature": 0.7}. The run then
            works in a workspace of its own and leaves the checkout as it is.
        revision: Commit, branch or tag to run, in a workspace of its own. Empty: the checkout as it is.
    """
    return run_stages(("infer", "evaluate"), overrides, revision)


if __name__ == "__main__":
    evaluate()

"""Cold start and GRPO-CSV on what is cached."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.pipeline import Overrides, run_name, run_stages


@flow(name="train", flow_run_name=run_name)
def train(overrides: Overrides | None = None, revision: str | None = None) -> dict[str, Any]:
    """Cold-start the policy, then train it with GRPO-CSV.

    Args:
        overrides: Parameters to change for this run, by dotted name, such as {"train.learning_rate": 1e-5}. The run
            then works in a workspace of its own and leaves the checkout as it is.
        revision: Commit, branch or tag to run, in a workspace of its own. Empty: the checkout as it is.
    """
    return run_stages(("coldstart", "train"), overrides, revision)


if __name__ == "__main__":
    train()

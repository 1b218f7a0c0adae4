"""Unequal ranks in single precision, and what is written down of a step at a rate of its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hocket.methods import Client, Update, method
from hocket.methods.lora import A, B
from hocket.schedules import Schedule, schedule
from hocket.server import Server
from hocket.tree import generator

M = "layers.0.q"


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator("single", *shape))


@pytest.mark.parametrize("least", [1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("name", ["hlora-delta", "raflora"])
def test_a_small_component_of_a_wide_module_stays_without_training(name: str, least: float) -> None:
    """What counts as rounding, and so as a direction nobody has, does not grow with the width of the module."""
    wide = 1500
    u, v = (torch.linalg.qr(draw(wide + i, 4))[0] for i in (0, 1))
    root = torch.tensor([1.0, 0.3, 0.1, least]).sqrt()
    m = method.build({"name": name, "rank": 8, "alpha": 8.0})
    state = m.init(
        {M + A: torch.cat([(v * root).T, draw(4, wide + 1)]), M + B: torch.cat([u * root, torch.zeros(wide, 4)], 1)}, 0
    )
    for _ in range(3):
        updates = []
        for c, rank in enumerate([2, 8]):
            sent = {k: torch.zeros_like(x) for k, x in m.send(state, Client(c, 1, {"rank": rank}), 0).items()}
            updates.append(Update(c, c, 0, 0, m.accept(state["params"], sent)))
        state = m.step(state, updates, [1.0, 1.0])
    a, b = state["params"][M + A], state["params"][M + B]
    assert float((u[:, 3] @ b) @ (a @ v[:, 3])) == pytest.approx(least, rel=0.02)
    assert not b[:, 4:].any()  # and what is rounding is still told from it: these rows can learn
    assert bool((a[4:].norm(dim=1) > 0.1).all())


def test_the_error_of_a_step_is_that_of_the_rate_it_was_made_at() -> None:
    class Half(type(schedule.build("sync"))):  # type: ignore[misc]
        def rate(self, server: Server, batch: list[Update]) -> float:
            return 0.5

    half: Schedule = Half()
    m = method.build({"name": "flexlora", "rank": 4})
    server = Server(m, half, {M + A: draw(4, 12), M + B: draw(14, 4)}, [Client(c) for c in range(2)], 1, 0)
    for job in server.poll():
        sent = {k: draw(*x.shape) for k, x in m.send(server.state, server.clients[job.client], 0).items()}
        assert server.receive(Update(job.id, job.client, 0, 0, sent)) is None
    step = server.step()
    assert step is not None
    assert step["layers"][M]["error"] < 1e-5  # FlexLoRA's server cuts nothing

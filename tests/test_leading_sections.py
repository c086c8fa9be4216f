# SPDX-License-Identifier: BSD-3-Clause
"""TilePlan::locate_led: the first heads go in smaller sections, as the Hopper forward has it."""

from __future__ import annotations

from types import ModuleType

from hypothesis import example, given
from hypothesis import strategies as st

from test_tile_plan import SECTIONS, SMALL, Call, located


@given(call=SMALL, lead=st.integers(0, 12), section=st.integers(1, 5))
@example(call=SECTIONS, lead=7, section=3)
def test_leading_heads_go_first_and_every_tile_is_reached_once(
    whitebox: ModuleType, call: Call, lead: int, section: int
):
    plan = call.plan(whitebox)
    whole = sorted(located(plan))
    lead = min(lead, plan.heads)
    plan.lead_heads, plan.lead_section_heads = lead, section
    order = located(plan, "locate_led")
    assert sorted(order) == whole
    heads = [(b * call.heads + h) // call.pack for b, h, *_ in order]
    leading = lead * plan.q_tiles * plan.splits * plan.column_blocks
    assert all(head < lead for head in heads[:leading])
    sections = [head // section for head in heads[:leading]]
    assert sections == sorted(sections)

"""The renovation world: its kernel is a distribution, its posterior exact, its story that of the paper's example."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest

from iterative_ppo.config import load_config
from iterative_ppo.environments import renovation
from iterative_ppo.environments.phrases import (
    BUSINESS,
    EDIT_PREFIX,
    INTERJECTIONS,
    REPLIES,
    ROOMS,
    TIERS,
    TONES,
    UNCLEAR,
    Act,
    acts,
    business_phrases,
    customer_phrases,
    openings,
    parse,
)
from iterative_ppo.environments.renovation import (
    BUYS,
    LEAVES,
    NAMES_ROOM,
    Hidden,
    Progress,
    Renovation,
    Script,
    Session,
    all_hidden,
    believed,
    posterior,
    replies,
    right_act,
    send,
)
from iterative_ppo.environments.rollout import collect, play
from iterative_ppo.mdp.conversation import ABSTAIN, Conversation, State, Suggestion, Turn
from iterative_ppo.mdp.turn_table import to_frame
from tasks.turn_checks import checks, grouped

OUTCOMES = {"purchase": 1.0}
START = (Progress(told_room=False), Progress(told_room=True))


class Says:
    """Suggests one wording of one act for ever; abstains where there is none."""

    def __init__(self, act: Act | None) -> None:
        self.act = act

    def sample(self, states: Sequence[State], seed: int = 0) -> list[Suggestion]:
        if self.act is None:
            return [ABSTAIN] * len(states)
        return [Suggestion(business_phrases(self.act)[0], "suggested") for _ in states]


class Mixed:
    """Suggests anything, sometimes nothing, sometimes nonsense."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = random.Random(seed)

    def sample(self, states: Sequence[State], seed: int = 0) -> list[Suggestion]:
        said = [text for act in acts() for text in business_phrases(act)] + ["blah", EDIT_PREFIX]
        return [ABSTAIN if self.rng.random() < 0.2 else Suggestion(self.rng.choice(said), "suggested") for _ in states]


def success(talks: Sequence[Conversation]) -> float:
    return float(np.mean([talk.turns[-1].outcomes[0] for talk in talks]))


def reachable(hidden: Hidden) -> set[Progress]:
    """Everything that a customer's progress can become under any messages."""
    seen, new = set(START), list(START)
    while new:
        progress = new.pop()
        for act in (*acts(), UNCLEAR):
            for _, reply in replies(hidden, progress, act):
                if reply.kind not in (None, "buys") and reply.progress not in seen:
                    seen.add(reply.progress)
                    new.append(reply.progress)
    return seen


# --- grammar ---------------------------------------------------------------------------------------------------------


def test_every_wording_is_read_back_as_its_act() -> None:
    assert len(acts()) == len(BUSINESS) - 1 + len(ROOMS) * len(TIERS)
    for act in acts():
        assert business_phrases(act)
        for text in business_phrases(act):
            assert parse(text) == act
            assert parse(f"{EDIT_PREFIX}{text}") == act, "an edit says the same"
            assert parse(f"  {text.replace(' ', '  ')} ") == act


def test_wordings_of_different_acts_are_different() -> None:
    texts = [text for act in acts() for text in business_phrases(act)]
    assert len(texts) == len(set(texts))


@pytest.mark.parametrize(
    "text", ["", "blah", "We can do your attic with our basic package.", "thanks for reaching out to us!"]
)
def test_anything_else_is_unclear(text: str) -> None:
    assert parse(text) == UNCLEAR and business_phrases(UNCLEAR) == ()


def test_a_customers_wording_tells_which_reply_it_is() -> None:
    """Within a tone no two replies, nor two openings, share a wording: the posterior of the progress is certain."""
    for tone in TONES:
        said = Counter(
            text
            for kind in REPLIES
            for interjection in (None, *INTERJECTIONS)
            for room, tier in product(ROOMS, TIERS)
            for text in set(customer_phrases(kind, interjection, tone, room, tier))
            if kind not in ("tells_room", "tells_budget")
        )
        assert set(said.values()) == {len(ROOMS) * len(TIERS)}, "the other replies do not depend on what is hidden"
        rooms = [text for room in ROOMS for text in customer_phrases("tells_room", None, tone, room, "basic")]
        budgets = [text for tier in TIERS for text in customer_phrases("tells_budget", None, tone, "kitchen", tier)]
        assert len(rooms) == len(set(rooms)) and len(budgets) == len(set(budgets))
        assert not set(said) & {*rooms, *budgets} and not set(rooms) & set(budgets)
    firsts = [text for tone in TONES for room in ROOMS for text in openings(tone, room, True)]
    firsts += [text for tone in TONES for text in openings(tone, "kitchen", False)]
    assert len(firsts) == len(set(firsts))


# --- kernel ----------------------------------------------------------------------------------------------------------


def test_the_kernel_is_a_distribution_in_every_reachable_situation() -> None:
    situations = 0
    for hidden in all_hidden():
        for progress in reachable(hidden):
            assert progress.annoyance <= hidden.patience
            for act in (*acts(), UNCLEAR):
                chances = [chance for chance, _ in replies(hidden, progress, act)]
                assert min(chances) > 0 and sum(chances) == pytest.approx(1.0, abs=1e-12)
                assert all(
                    reply.kind is None or renovation._wordings(hidden, reply)
                    for _, reply in replies(hidden, progress, act)
                )
                situations += 1
    assert len(all_hidden()) == len(set(all_hidden())) == 96
    assert situations > 30_000


def test_a_purchase_needs_room_and_budget_told_before_the_matching_offer() -> None:
    for hidden in all_hidden():
        for progress in reachable(hidden):
            for act in (*acts(), UNCLEAR):
                chance = sum(chance for chance, reply in replies(hidden, progress, act) if reply.bought)
                ready = progress.told_room and progress.told_budget and progress.pending is None
                matches = act == Act("offer", hidden.room, hidden.tier)
                assert chance == pytest.approx((1 - LEAVES) * BUYS if ready and matches else 0.0)


def test_patience_only_falls_and_facts_once_told_stay_told() -> None:
    for hidden in all_hidden()[::7]:
        for progress in reachable(hidden):
            for act in (*acts(), UNCLEAR):
                for _, reply in replies(hidden, progress, act):
                    after = reply.progress
                    assert after.annoyance >= progress.annoyance
                    assert after.told_room >= progress.told_room and after.told_budget >= progress.told_budget


def test_the_representative_likes_what_sounds_kind_better_than_what_helps() -> None:
    """Acceptance is no measure of success: the paper's point in section 2.2."""
    rng = random.Random(0)
    shares = {}
    for kind in ("chat", "ask_budget", "answer"):
        said = Suggestion(business_phrases(Act(kind))[0], "suggested")
        fates = Counter(send(said, Progress(told_room=True), rng)[1] for _ in range(800))
        shares[kind] = fates["verbatim"] / 800
        assert set(fates) == {"verbatim", "edited", "rejected"}
    assert shares["chat"] > shares["ask_budget"] + 0.2 > shares["answer"] + 0.4


def test_what_is_sent_fits_how_it_is_said_to_have_fared() -> None:
    rng = random.Random(1)
    for act in acts():
        said = Suggestion(business_phrases(act)[0], "suggested")
        for _ in range(60):
            sent, adoption = send(said, Progress(), rng)
            if adoption == "verbatim":
                assert sent == said.text
            elif adoption == "edited":
                assert sent.startswith(EDIT_PREFIX) and parse(sent) == act
    for nothing in (ABSTAIN, Suggestion("", "suggested")):
        sent, adoption = send(nothing, Progress(pending="question"), rng)
        assert adoption is None and parse(sent) == Act("answer"), "only the representative knows the papers"


# --- posterior -------------------------------------------------------------------------------------------------------


def test_the_posterior_is_that_of_rejection_sampling() -> None:
    """Customers from the prior: among those with the same history, each hidden state is as frequent as it says."""
    by_history: dict[tuple[str | None, ...], list[tuple[Hidden, Progress]]] = {}
    states: dict[tuple[str | None, ...], State] = {}
    talk = Says(Act("ask_room"))
    for session in Renovation().start(24_000, seed=11):
        for turn in range(3):
            state = session.state
            key = tuple(text for t in state.history for text in (t.customer_message, t.business_message))
            key = (*key, state.customer_message)
            by_history.setdefault(key, []).append((session._hidden, session._progress))
            states[key] = state
            if turn == 2:
                break
            session.step((talk if turn == 0 else Says(Act("chat"))).sample([state])[0])
            if session.closed:
                break
    common = sorted(by_history, key=lambda key: -len(by_history[key]))
    chosen = [key for length in (1, 3, 5) for key in [k for k in common if len(k) == length][:12]]
    compared = 0
    for key in chosen:
        seen, count = Counter(by_history[key]), len(by_history[key])
        belief = posterior(states[key])
        assert set(seen) <= set(belief), "nothing happens that the posterior rules out"
        assert sum(belief.values()) == pytest.approx(1.0)
        for situation, chance in belief.items():
            error = np.sqrt(chance * (1 - chance) / count)
            assert abs(seen[situation] / count - chance) <= 4 * error + 1 / count
            compared += 1
    assert compared > 500 and min(len(by_history[key]) for key in chosen) > 60


def test_the_opening_tells_tone_and_perhaps_the_room_and_nothing_else() -> None:
    for tone, names_room in product(TONES, (False, True)):
        belief = posterior(State((), openings(tone, "bathroom", names_room)[0]))
        assert {hidden.tone for hidden, _ in belief} == {tone}
        assert {hidden.room for hidden, _ in belief} == ({"bathroom"} if names_room else set(ROOMS))
        assert {progress for _, progress in belief} == {Progress(told_room=names_room)}
        assert max(belief.values()) == pytest.approx(min(belief.values()))


def test_a_history_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="no customer of this world says that"):
        posterior(State((), "Good morning."))
    leaves = Turn(openings("warm", "kitchen", False)[0], (0.0,), ABSTAIN, business_phrases(Act("chat"))[0], None)
    with pytest.raises(ValueError, match="no customer"):
        posterior(State((leaves,), customer_phrases("buys", None, "warm", "kitchen", "basic")[0]))


def test_what_was_told_and_what_is_pending_is_certain_from_what_was_said() -> None:
    """So the representative, whose behaviour depends on it, tells nothing more about the hidden state."""
    talks = collect(Mixed(), Renovation(), 200, seed=5, policy_version="mixed")
    for talk in talks:
        for i in range(len(talk.turns) - 1):
            belief = posterior(talk.state(i))
            assert len({(p.told_room, p.told_budget, p.pending, p.annoyance) for _, p in belief}) == 1


def test_an_attentive_reader_knows_what_was_told() -> None:
    first, told = (
        openings("brief", "bedroom", True)[0],
        customer_phrases("tells_budget", "thinking", "brief", "bedroom", "basic"),
    )
    assert believed(State((), first)) == renovation.Believed("bedroom", None, None)
    asked = Turn(first, (0.0,), ABSTAIN, business_phrases(Act("ask_budget"))[1], None)
    known = believed(State((asked,), told[0]))
    assert known == renovation.Believed("bedroom", "basic", "thinking")
    assert right_act(known) == Act("wait")
    assert right_act(replace(known, pending="question")) is None, "abstain: only the representative can answer"
    assert right_act(replace(known, pending=None)) == Act("offer", "bedroom", "basic")
    assert right_act(renovation.Believed("bedroom", None, None)) == Act("ask_budget")
    assert right_act(renovation.Believed(None, None, None)) == Act("ask_room")


# --- conversations ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def oracle() -> list[Conversation]:
    return collect(Script(1.0), Renovation(), 1000, seed=2, policy_version="oracle")


@pytest.fixture(scope="module")
def mixed() -> list[Conversation]:
    return collect(Mixed(), Renovation(), 400, seed=3, policy_version="mixed")


def test_the_right_acts_sell_and_mere_kindness_does_not(oracle: list[Conversation]) -> None:
    assert success(oracle) >= 0.80
    kind = collect(Says(Act("chat")), Renovation(), 1000, seed=2, policy_version="kind")
    assert success(kind) <= 0.01
    accepted = [np.mean([t.adoption == "verbatim" for c in talks for t in c.turns[:-1]]) for talks in (oracle, kind)]
    assert accepted[1] > accepted[0] + 0.2, "yet kindness is what the representative accepts"


def test_skill_pays(oracle: list[Conversation]) -> None:
    rates = [success(collect(Script(skill), Renovation(), 300, 2, "s")) for skill in (0.0, 0.36, 0.7)]
    assert rates[0] < rates[1] < rates[2] < success(oracle)
    assert 0.1 < rates[1] < 0.35, "the corpus of pi_0 leaves room above it"


def test_no_conversation_has_more_business_turns_than_allowed(mixed: list[Conversation]) -> None:
    assert max(len(talk.turns) - 1 for talk in mixed) <= 8
    short = collect(Script(1.0), Renovation(3), 200, seed=2, policy_version="s")
    assert max(len(talk.turns) - 1 for talk in short) == 3
    assert success(short) > 0.1, "a purchase in the last turn counts"


def test_rollouts_are_valid_turn_tables(oracle: list[Conversation], mixed: list[Conversation]) -> None:
    kind = collect(Says(None), Renovation(), 100, seed=1, policy_version="silent", arm="champion")
    frame = to_frame([*oracle, *mixed, *kind], OUTCOMES, 0.2)
    found = checks(grouped(frame), OUTCOMES)
    assert len(found) > 15
    assert {name: int((~holds).sum()) for name, holds in found.items() if not holds.all()} == {}


def test_validation_keeps_every_rollout(mixed: list[Conversation], tmp_path: Path) -> None:
    from tasks.validation import validate

    config = load_config(overrides={"data.root": str(tmp_path)})
    frame = to_frame(mixed[:60], config.outcomes, config.data.evidence_share)
    checked = validate(frame, config)
    assert checked.bad.empty and len(checked.good) == len(frame)


def test_ids_name_version_arm_and_seed() -> None:
    one, two = (collect(Says(None), Renovation(), 30, 1, "v", arm) for arm in ("champion", "challenger"))
    other = collect(Says(None), Renovation(), 30, 2, "v", "champion")
    assert len({talk.conversation_id for talk in (*one, *two, *other)}) == 90
    assert len({talk.customer_id for talk in (*one, *two, *other)}) == 90
    assert len({talk.business_id for talk in one}) == 20
    assert {(talk.policy_version, talk.arm) for talk in two} == {("v", "challenger")}


def test_a_seed_has_the_same_customers_whatever_the_policy() -> None:
    def customers(policy: Says | Mixed | Script) -> list[tuple[Hidden, str | None]]:
        sessions = Renovation().start(50, seed=9)
        hidden = [session._hidden for session in sessions]
        play(policy, sessions, seed=9)
        assert [session._hidden for session in sessions] == hidden
        return [(h, session.turns[0].customer_message) for h, session in zip(hidden, sessions, strict=True)]

    first = customers(Says(Act("chat")))
    assert customers(Script(1.0)) == customers(Mixed()) == customers(Says(None)) == first
    fewer = Renovation().start(10, seed=9)
    assert [session._hidden for session in fewer] == [hidden for hidden, _ in first[:10]], "and however many others"
    assert [s._hidden for s in Renovation().start(50, seed=10)] != [hidden for hidden, _ in first]


def test_the_same_policy_and_seed_give_the_same_conversations() -> None:
    one, other = (collect(Script(0.5), Renovation(), 40, 7, "s") for _ in range(2))
    assert one == other


def test_customers_come_from_the_uniform_prior() -> None:
    sessions = Renovation().start(9600, seed=1)
    counts = Counter(session._hidden for session in sessions)
    assert len(counts) == 96
    assert sum((count - 100) ** 2 / 100 for count in counts.values()) < 95 + 4 * np.sqrt(2 * 95)
    named = np.mean([session._progress.told_room for session in sessions])
    assert abs(named - NAMES_ROOM) < 4 * np.sqrt(NAMES_ROOM * (1 - NAMES_ROOM) / 9600)


def test_a_state_holds_what_was_said_and_not_what_is_hidden() -> None:
    """Two customers who differ in all that is hidden but said the same give equal states."""
    one, other = all_hidden()[0], all_hidden()[-1]
    history = (Turn("Hello.", (0.0,), ABSTAIN, "Hi.", None),)
    sessions = [
        Session(hidden, progress, history, "So?", random.Random(k), 8)
        for k, (hidden, progress) in enumerate(((one, Progress()), (other, Progress(True, True, "question", 3))))
    ]
    assert sessions[0].state == sessions[1].state == State(history, "So?")
    told = {field.name for kind in (State, Turn, Suggestion) for field in fields(kind)}
    assert not told & {field.name for kind in (Hidden, Progress) for field in fields(kind)}


# --- counterfactual futures ------------------------------------------------------------------------------------------


def test_resumed_conversations_continue_the_history() -> None:
    state = max(
        (talk.state(i) for talk in collect(Script(0.6), Renovation(), 40, 4, "s") for i in range(len(talk.turns) - 1)),
        key=lambda state: len(state.history) if len(state.history) < 4 else 0,
    )
    assert len(state.history) == 3
    sessions = Renovation().resume(state, 200, seed=1)
    assert all(session.state == state and not session.closed for session in sessions)
    belief = posterior(state)
    drawn = Counter((session._hidden, session._progress) for session in sessions)
    assert set(drawn) <= set(belief)
    play(Script(1.0), sessions, seed=0)
    assert all(session.closed and tuple(session.turns[:3]) == state.history for session in sessions)
    assert all(session.turns[3].customer_message == state.customer_message for session in sessions)
    assert max(len(session.turns) for session in sessions) <= 9
    assert len({tuple(session.turns) for session in sessions}) > 20, "each has its own luck"
    again = Renovation().resume(state, 200, seed=1)
    assert Counter((session._hidden, session._progress) for session in again) == drawn


def test_counterfactual_futures_succeed_as_often_as_fresh_ones() -> None:
    """Resuming after one turn and averaging over openings gives the policy's own rate."""
    fresh = success(collect(Script(1.0), Renovation(), 1000, seed=21, policy_version="s"))
    sessions = [
        Renovation().resume(session.state, 1, seed=k)[0] for k, session in enumerate(Renovation().start(1000, 22))
    ]
    play(Script(1.0, seed=1), sessions, seed=0)
    resumed = float(np.mean([session.turns[-1].outcomes[0] for session in sessions]))
    assert abs(fresh - resumed) < 4 * np.sqrt(2 * fresh * (1 - fresh) / 1000)


def test_what_was_told_stays_told_along_a_conversation(mixed: list[Conversation]) -> None:
    for talk in mixed[:60]:
        known = [believed(talk.state(i)) for i in range(len(talk.turns) - 1)]
        for before, after in pairwise(known):
            assert before.room in (None, after.room) and before.tier in (None, after.tier)

"""The protocol: its sum is the plain one for any drop-outs above the threshold, and no more."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxfm.federated.secure import client as clients
from jaxfm.federated.secure import server as servers
from jaxfm.federated.secure.graph import complete_graph, ring
from jaxfm.federated.secure.keys import KEY_BYTES, add_mask
from jaxfm.federated.secure.messages import Delivery, Introduction, Survivors, message_bytes
from jaxfm.federated.secure.play import Dropouts, secure_sum

COUNT = 9
GRAPHS = {
    "complete": complete_graph(range(COUNT), 6),
    "ring": ring([4, 0, 7, 2, 8, 1, 5, 3, 6], 4, 3, 5),
}
every_graph = pytest.mark.parametrize("name", GRAPHS)


def words(seed: int = 0, size: int = 5) -> dict[int, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {i: rng.integers(0, 2**32, size, dtype=np.uint32) for i in range(COUNT)}


def allowed(graph, dropouts: Dropouts) -> bool:
    """Whether enough are left at every stage: of all, and of every neighbourhood."""
    left = set(range(COUNT))
    for gone in dropouts[:2]:
        left -= set(gone)
        near = [len(left & {i, *graph.neighbours[i]}) for i in left]
        if len(left) < graph.least or min(near) < graph.threshold:
            return False
    shared = set(range(COUNT)) - set(dropouts[0])
    answering = left - set(dropouts[2])
    needed = [i for i in shared if i in left or left & set(graph.neighbours[i])]
    return all(len(answering & {i, *graph.neighbours[i]}) >= graph.threshold for i in needed)


@every_graph
@given(stages=st.lists(st.sampled_from([3, 3, 3, 3, 0, 1, 2]), min_size=COUNT, max_size=COUNT))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_the_sum_is_that_of_those_who_uploaded_or_it_is_refused(name, stages):
    """Client i leaves before stage `stages[i]`; 3 stays."""
    graph, given_words = GRAPHS[name], words()
    left = [{i for i in range(COUNT) if stages[i] == stage} for stage in range(3)]
    dropouts = Dropouts(*left)
    if not allowed(graph, dropouts):
        with pytest.raises(ValueError, match=r"no sum is read|is not read|stays hidden"):
            secure_sum(given_words, graph, dropouts)
        return
    outcome = secure_sum(given_words, graph, dropouts)
    assert outcome.present == set(range(COUNT)) - left[0] - left[1]
    np.testing.assert_array_equal(outcome.total, plain(given_words, outcome.present))


def plain(given_words, present) -> np.ndarray:
    return sum((given_words[i] for i in present), np.zeros_like(given_words[0]))


@pytest.mark.parametrize("num_lost", range(COUNT))
@pytest.mark.parametrize("stage", range(3))
def test_the_threshold_is_sharp(stage, num_lost):
    """All pairs: six of nine must stay, whenever the others leave."""
    lost = [set(), set(), set()]
    lost[stage] = set(range(num_lost))
    if COUNT - num_lost < 6:
        with pytest.raises(ValueError, match=r"not read|stays hidden"):
            secure_sum(words(), GRAPHS["complete"], Dropouts(*lost))
    else:
        outcome = secure_sum(words(), GRAPHS["complete"], Dropouts(*lost))
        np.testing.assert_array_equal(outcome.total, plain(words(), outcome.present))


def chi_square(data: np.ndarray) -> float:
    """Deviations, in standard ones, of the statistic of uniform bytes."""
    counts = np.bincount(data, minlength=256)
    expected = data.size / 256
    return (((counts - expected) ** 2 / expected).sum() - 255) / np.sqrt(2 * 255)


@pytest.mark.parametrize("value", [0, 1, 2**32 - 1, None])
def test_one_upload_alone_looks_uniform(value):
    """Whatever is sent: each byte of its words, of their differences and of what was added."""
    size = 100_000
    sent = np.arange(size, dtype=np.uint32) if value is None else np.full(size, value, np.uint32)
    seen = started(size)
    masked = seen.upload(2, sent).words
    for data in (masked, masked[1:] - masked[:-1], masked ^ sent):
        for byte in data.view(np.uint8).reshape(-1, 4).T:
            assert abs(chi_square(byte)) < 5
    # Correlation of neighbouring bits: a stream that repeats would show here.
    bits = np.unpackbits(masked.view(np.uint8)).astype(np.float64) - 0.5
    assert abs((bits[1:] * bits[:-1]).mean() * 4) < 5 / np.sqrt(bits.size)


class started:
    """A round of nine clients and all pairs, stage by stage."""

    def __init__(self, size: int = 5, graph=GRAPHS["complete"]):
        self.size, self.states, keys = size, {}, []
        for i in range(COUNT):
            self.states[i], message = clients.advertise(i)
            keys.append(message)
        self.keys = keys
        self.server, self.introductions = servers.introduce(graph, keys)
        self.shares = []
        for i in range(COUNT):
            self.states[i], message = clients.share(self.states[i], self.introductions[i])
            self.shares.append(message)
        self.server, self.deliveries = servers.deliver(self.server, self.shares)

    def upload(self, i: int, sent=None):
        sent = np.zeros(self.size, np.uint32) if sent is None else sent
        self.states[i], message = clients.upload(self.states[i], self.deliveries[i], sent)
        return message

    def revealed(self, present):
        self.server, asked = servers.collect(self.server, [self.upload(i) for i in present])
        answers = []
        for i, question in asked.items():
            self.states[i], answer = clients.unmask(self.states[i], question)
            answers.append(answer)
        return answers


@every_graph
def test_the_server_learns_one_secret_of_each_client(name):
    """Of a present client shares of its seed, of a dropped one of its key; of nobody both."""
    seen = started(graph=GRAPHS[name])
    present = {0, 1, 2, 3, 4, 6, 7}
    answers = seen.revealed(sorted(present))
    seeds = set().union(*(answer.seeds for answer in answers))
    keys = set().union(*(answer.masking_keys for answer in answers))
    assert seeds == present
    assert keys == {5, 8}
    # What went over the wire before was sealed or public: no seed and no private key is in it.
    secrets = [x for s in seen.states.values() for x in (s.seed, s.masking.private)]
    wire = b"".join(
        part for m in seen.shares for part in (*m.sealed.values(), m.digest)
    ) + b"".join(part for key in seen.keys for part in key[1:])
    assert all(secret not in wire for secret in secrets)


def test_no_client_answers_for_both_kinds_of_shares():
    seen = started()
    seen.server, asked = servers.collect(seen.server, [seen.upload(i) for i in range(8)])
    question = asked[0]
    both = Survivors(question.present, (*question.dropped, 3))
    with pytest.raises(ValueError, match=r"\[3\] are named as present and as dropped"):
        clients.unmask(seen.states[0], both)
    state, _ = clients.unmask(seen.states[0], question)
    with pytest.raises(ValueError, match="cannot unmask now: its last stage was 'unmask'"):
        clients.unmask(state, Survivors((0, 1, 2, 4, 5, 6, 7), (3, 8)))
    assert not state.shares


def test_a_seed_and_its_sign_make_the_mask():
    seed, size = bytes(range(KEY_BYTES)), 2**16 + 77  # over the edge of a chunk
    masked = np.arange(size, dtype=np.uint32)
    add_mask(masked, seed, 1)
    # AES-256-CTR of zeros with key 00..1f and counter 0: the cipher's first block.
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    stream = Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor().update(bytes(4 * size))
    expected = np.arange(size, dtype=np.uint32) + np.frombuffer(stream, "<u4")
    np.testing.assert_array_equal(masked, expected)
    add_mask(masked, seed, -1)
    np.testing.assert_array_equal(masked, np.arange(size))


def test_bytes_are_those_of_keys_shares_and_words():
    outcome = secure_sum(words(size=100), GRAPHS["complete"])
    near = COUNT - 1
    assert outcome.bytes_up == {
        "advertise": COUNT * (4 + 64),
        "share": COUNT * (4 + near * (4 + 88) + 32),
        "upload": COUNT * (4 + 400),
        "unmask": COUNT * (4 + COUNT * (4 + 36)),
    }
    assert outcome.bytes_down == {
        "advertise": COUNT * (4 + near * 2 * (4 + 32)),
        "share": COUNT * near * (4 + 88),
        "upload": COUNT * COUNT * 4,
        "unmask": 0,
    }
    assert message_bytes(Delivery({1: b"abc"})) == 7


def changed(message: bytes) -> bytes:
    """Another byte in the middle: X25519 ignores some bits of the first."""
    return message[:9] + bytes([message[9] ^ 1]) + message[10:]


class TestRefusals:
    """What is missing, changed or a stranger's is refused with one sentence."""

    def test_stages_out_of_order(self):
        state, _ = clients.advertise(0)
        with pytest.raises(ValueError, match="cannot upload now: its last stage was 'advertise'"):
            clients.upload(state, Delivery({}), np.zeros(3, np.uint32))

    def test_keys(self):
        seen, graph = started(), GRAPHS["complete"]
        with pytest.raises(ValueError, match="graph is of 9 clients and keys are of 8"):
            servers.introduce(graph, seen.keys[1:])
        with pytest.raises(ValueError, match="Client 0 sent its keys twice"):
            servers.introduce(graph, [seen.keys[0], *seen.keys])
        short = seen.keys[0]._replace(masking=b"short")
        with pytest.raises(ValueError, match="Keys of client 0 must have 32 bytes"):
            servers.introduce(graph, [short, *seen.keys[1:]])

    def test_introductions(self):
        state, own = clients.advertise(0)
        _, other = clients.advertise(1)
        with pytest.raises(ValueError, match="threshold=3 must be at least 2 and at most 2"):
            clients.share(state, Introduction(3, {1: other.sealing}, {1: other.masking}))
        with pytest.raises(ValueError, match=r"was introduced to \[0\]"):
            clients.share(state, Introduction(2, {0: own.sealing}, {0: own.masking}))
        with pytest.raises(ValueError, match="public key of client 1 is no X25519 key"):
            clients.share(state, Introduction(2, {1: bytes(32)}, {1: other.masking}))

    def test_shares(self):
        seen = started()
        fewer = seen.shares[0]._replace(sealed=dict(list(seen.shares[0].sealed.items())[1:]))
        with pytest.raises(ValueError, match="Client 0 sealed shares for"):
            servers.deliver(seen.server, [fewer, *seen.shares[1:]])
        with pytest.raises(ValueError, match="Only 5 of 9 clients shared their secrets"):
            servers.deliver(seen.server, seen.shares[:5])
        parcel = seen.deliveries[0].sealed
        for damaged in (changed(parcel[3]), parcel[4], b""):
            sealed = parcel | {3: damaged}
            with pytest.raises(ValueError, match="from client 3 to client 0 cannot be opened"):
                clients.upload(seen.states[0], Delivery(sealed), np.zeros(3, np.uint32))
        few = Delivery(dict(list(parcel.items())[:4]))
        with pytest.raises(ValueError, match="Client 0 has shares of 4 neighbours"):
            clients.upload(seen.states[0], few, np.zeros(3, np.uint32))
        with pytest.raises(ValueError, match=r"Clients \[12\] are no neighbours of 0"):
            clients.upload(seen.states[0], Delivery({12: b""}), np.zeros(3, np.uint32))

    @pytest.mark.parametrize("bad", [np.zeros(3), np.zeros((3, 1), np.uint32), np.int32(4)])
    def test_words(self, bad):
        seen = started()
        with pytest.raises(ValueError, match=r"words are uint32\[m\]"):
            seen.upload(0, bad)

    def test_uploads(self):
        seen = started()
        first, second = seen.upload(0), seen.upload(1, np.zeros(6, np.uint32))
        with pytest.raises(ValueError, match="Client 0 has uploaded already"):
            servers.collect(seen.server, [first, first])
        with pytest.raises(ValueError, match="Client 1 uploaded 6 words, and others 5"):
            servers.collect(seen.server, [first, second])
        with pytest.raises(ValueError, match="Client 77 has shared no secrets"):
            servers.collect(seen.server, [first._replace(client=77)])
        with pytest.raises(ValueError, match="Only 1 of 9 clients uploaded"):
            servers.collect(seen.server, [first])

    def test_survivors(self):
        seen = started()
        seen.server, asked = servers.collect(seen.server, [seen.upload(i) for i in range(7)])
        state = seen.states[0]
        with pytest.raises(ValueError, match="the server named"):
            clients.unmask(state, Survivors(asked[0].present, ()))
        with pytest.raises(ValueError, match="Only 5 of client 0 and its neighbours are present"):
            clients.unmask(state, Survivors((0, 1, 2, 3, 4), (5, 6, 7, 8)))

    def test_revealed_shares(self):
        seen = started()
        answers = seen.revealed(range(7))
        finish = functools.partial(servers.finish, seen.server)
        np.testing.assert_array_equal(finish(answers), np.zeros(5, np.uint32))
        np.testing.assert_array_equal(finish(answers[:6]), np.zeros(5, np.uint32))
        with pytest.raises(ValueError, match=r"client 0 needs 6 shares and 5 came; the sum stays"):
            finish(answers[:5])
        with pytest.raises(ValueError, match="Client 0 sent its revealed shares twice"):
            finish([answers[0], *answers])
        more = answers[0]._replace(masking_keys=answers[0].masking_keys | {3: bytes(36)})
        with pytest.raises(ValueError, match="Client 0 revealed shares that were not asked for"):
            finish([more, *answers[1:]])
        for part in ("seeds", "masking_keys"):
            given_parts = getattr(answers[0], part)
            victim = max(given_parts)
            forged = answers[0]._replace(
                **{part: given_parts | {victim: changed(given_parts[victim])}}
            )
            with pytest.raises(ValueError, match=f"of client {victim} (were changed|is lost)"):
                finish([forged, *answers[1:]])

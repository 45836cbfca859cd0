"""Malformed flags: each is refused before any training, in one sentence of the library's own."""

import subprocess
import sys

import jax
import pytest
from refusals import SCRIPTS, check_refused, no_training

from jaxfm import hub
from jaxfm.testing import tiny_decoder, tiny_encoder
from jaxfm.tokenizer import ByteTokenizer

HUGE = 10**11

# What every federated command below begins with.
DIGITS = "--data=digits --model.family=mlp --data.local_validation=0.1 --data.public=0.1"

FLAGS = {
    "federate": f"""
        --rounds=0 | rounds=0
        --rounds=x | rounds='x'
        --rounds=1.5 | rounds='1.5'
        --rounds= | rounds=''
        --rounds=nan | rounds='nan'
        --rounds=1e400 | rounds='1e400'
        --rounds={HUGE} | rounds={HUGE}
        --cohort_size=0 | cohort_size=0
        --cohort_size=25 | cohort_size=25
        --batch_size=-3 | batch_size=-3
        --batch_size={HUGE} | batch_size={HUGE}
        --epochs=0 | epochs=0
        --epochs={HUGE} --max_steps=0 | epochs={HUGE}
        --max_steps=-1 | max_steps=-1
        --drop_rate=1 | drop_rate=1.0
        --drop_rate=nan | drop_rate=nan
        --robust=mean | robust.rule='mean' is not a choice
        --robust=krum --robust.fraction=0.5 | robust.fraction=0.5
        --robust=median --robust.fraction=0.2 | robust.fraction=0.2 changes nothing
        --robust.bound=1 | robust.bound=1.0 changes nothing
        --robust=krum --cohort_size=2 | robust=krum needs cohort_size
        --robust=median --algorithm=hetero_fl | takes clients of one kind
        --robust=median --algorithm=scaffold --local=sgd | outside of a mean
        --robust=fl_trust | have no 'label' here
        --robust=median --secure | Secure sums do not fit
        --tiers= | tiers=()
        --tiers=0 | tiers=(0.0,)
        --tiers=1,x | tiers='x'
        --tiers=1,0.5 | tiers=(1.0, 0.5) changes nothing with fed_avg
        --tiers=1,0.5 --compare=fed_avg,spatl | changes nothing with fed_avg, spatl
        --data.tokenizer=bytes | data.tokenizer=bytes changes nothing
        --data.length=64 | data.length=64 changes nothing
        --data.standardize | data.standardize=True
        --profile=toaster | 'toaster'
        --deadline_s=5 | deadline_s=5.0
        --deadline_s=nan --profile=pi | deadline_s=nan
        --deadline_s=1e-12 --profile=pi | deadline_s=1e-12
        --upload=9bit | upload='9bit'
        --secure=maybe | secure
        --secure --secure.threshold=0 | secure.threshold=0
        --secure.limit=2 | change nothing without --secure
        --private.epsilon=-1 | private.epsilon=-1
        --examples.clip=2 | examples.clip=2.0 changes nothing
        --examples.noise_multiplier=-1 | examples.noise_multiplier=-1
        --private.clip=2 | private.clip=2.0 changes nothing
        --private.noise_multiplier=1 --quorum=2 | quorum=2
        --private.noise_multiplier=1 --private.delta=0 | delta=0.0
        --private.noise_multiplier=1 --algorithm=hetero_fl | one kind of client
        --top_k=0.2 | top_k=0.2
        --upload=top_k --top_k=nan | top_k=nan
        --download=top_k | download='top_k'
        --eval_every=0 | eval_every=0
        --eval_examples=-1 | eval_examples=-1
        --seeds=2 | seeds=2
        --compare=fed_avg,fed_avgg | 'fed_avgg'
        --algorithm=fed_avgg | 'fed_avgg'
        --seed=-1 | seed=-1
        --seed=18446744073709551616 | seed=18446744073709551616
        --clients_at_once=-1 | clients_at_once=-1
        --unknown=1 | --unknown
        --cohrt=3 | --cohort_size
        --rounds | --rounds
        stray | 'stray'
        --spatl.keep=0.5 | --algorithm=spatl
        --algorithm=spatl --spatl.keep=2 | keep=2.0
        --algorithm=spatl --spatl.select_times=0 | select_times=0
        --algorithm=fed_prox --fed_prox.mu=nan | mu=nan
        --algorithm=fed_dyn --fed_dyn.alpha=0 | alpha=0.0
        --algorithm=fed_adam --fed_adam.b1=1 | b1=1.0
        --algorithm=fed_adam --fed_adam.learning_rate=-1 | learning_rate=-1.0
        --algorithm=fed_dp --fed_dp.threshold=-1 | threshold=-1.0
        --algorithm=fed_df --fed_df.distill_steps=0 | got 0
        --algorithm=fed_df --data.public=0 | --data.public
        --algorithm=hetero_fl --tiers=nan | tiers=(nan,)
        --config=missing.json | missing.json
        --config=/ | /
        --data.num_clients=0 | data.num_clients=0
        --data.num_clients=100000000 | 100000000 clients
        --data.num_clients={HUGE} | data.num_clients={HUGE}
        --data.beta=0 | data.beta=0.0
        --data.beta=nan | data.beta=nan
        --data.local_test=1 | data.local_test=1.0
        --data.local_test=0.9999 | 0.9999
        --data.local_validation=1 | data.local_validation=1.0
        --data.local_validation=0.9999 | 0.9999
        --data.public=-0.1 | data.public=-0.1
        --data.public=0.9999 | public=0.9999
        --data.synthetic=-1 | data.synthetic=-1
        --data.synthetic=10 | data.synthetic=10
        --data.length=0 | data.length=0
        --data.partition=shards --data.shards_per_client=1000000 | 1000000
        --data.partition=foo | data.partition='foo'
        --data.partition=natural | digits
        --data.folder=x | data.folder='x'
        --data.label=x | data.label='x'
        --data.image_size=3 | data.image_size=(3,)
        --data.encoding=foo | data.encoding='foo'
        --data.writers=x | data.writers='x'
        --data.source= | path is empty
        --data.source=digit | 'digit'
        --data.source=no/such/place | no/such/place
        --data.source=text | data.source=text
        --data.source=mnist --data.folder=x --data.partition=natural | natural
        --model.family=decoder | model.family=decoder
        --model.family=vit --model.embed_dim=0 | embed_dim=0
        --model.family=vit --model.num_heads=0 | num_heads=0
        --model.family=vit --model.num_heads=3 | num_heads=3
        --model.family=vit --model.num_layers=-2 | num_layers=-2
        --model.family=resnet20 --model.dtype=float16 | model.dtype='float16'
        --local=adamw | local.name='adamw'
        --local.learning_rate=nan | learning_rate=nan
        --local.momentum=0.9 | momentum=0.9
        --local=sgd --local.momentum=1 | momentum=1.0
        --local.clip_norm=0 | clip_norm=0.0
        --run_dir=/dev/null | /dev/null
        --run_dir=/proc/none | /proc/none""",
    "pretrain": f"""
        --steps=0 | steps=0
        --batch_size=0 | batch_size=0
        --eval_examples=-1 | eval_examples=-1
        --eval_every={HUGE} | eval_every={HUGE}
        --seed=-1 | seed=-1""",
    "search": """
        --macs=0 | --macs
        --macs=2 | macs=2.0
        --macs=nan | macs=nan
        --macs=1e-9 | macs
        --parameters=1e-9 | parameters
        --strategy=foo | strategy='foo'
        --policy=x --strategy=uniform | policy='x'
        --policy=missing | missing
        --evaluations=0 | evaluations=0
        --finalists=-1 | finalists=-1
        --reward_examples=-1 | reward_examples=-1
        --calibration_examples=0 | calibration_examples=0
        --finetune_epochs=-1 | finetune_epochs=-1
        --channel_multiple=0 | channel_multiple=0
        --model=resnet21 | ResNet-21
        --model=foo | model='foo'
        --model=vgg99 | VGG-99
        --weights=missing.npz --model=resnet20 | missing.npz
        --normalise=imagenet | normalise=imagenet
        --seed=-1 | seed=-1
        --importance=l3 | importance='l3'""",
    "supernet": """
        --shares=0 | shares=(0.0,)
        --shares= | shares=()
        --shares=0.001 | shares=(0.001,)
        --axes=foo | 'foo'
        --axes=layer --cost=macs | cost=macs
        --kernels=4 | kernels=(4,)
        --smallest=2 | smallest=2.0
        --scored=5 | scored=5
        --num_random=-1 | num_random=-1
        --score_examples=-1 | score_examples=-1
        --calibration_batches=0 | calibration_batches=0
        --save_every=0 | save_every=0
        --seed=-1 | seed=-1""",
    "simulate": f"""
        --stages=0 | stages=0
        --stage_s=0 | stage_s=0.0
        --stage_s=nan | stage_s=nan
        --draft_s=inf | draft_s=inf
        --right=0.9,0.1 | right=(0.9, 0.1)
        --right= | right=()
        --width=2 | width=2
        --slow=1,1 | slow=(1.0, 1.0)
        --stages=2 --slow=-1,1 | slow=(-1.0, 1.0)
        --stages=2 --slow=0,nan | slow=(0.0, nan)
        --fixed_length=0 | fixed_length=0
        --tokens={HUGE} | tokens={HUGE}
        --seed=-1 | seed=-1
        --report=/ | report=/""",
    "report": "--run_dir=missing | missing",
    "demo": """
        --num_prompts=0 | num_prompts=0
        --prompt_bytes=-5 | prompt_bytes=-5
        --draft_length=0 | draft_length=0
        --quick=maybe | quick
        --seed=-1 | seed=-1""",
    "generate": f"""
        --prompt= | --prompt
        --prompt_file=missing | missing
        --prompt_file=/ | /
        --draft=lookup | 'lookup'
        --decoder=speculative | speculative
        --decoder=speculative --draft=exit:x | 'exit:x'
        --decoder=speculative --draft=exit:99 | layers=99
        --decoder=speculative --draft=lookup+ | 'lookup+'
        --decoder=speculative --draft=no/folder/here | no/folder/here
        --decoder=speculative --draft=ENCODER | causal
        --decoder=foo | decoder='foo'
        --decoder=pipeinfer --pipeinfer.stages=0 | stages=0
        --decoder=pipeinfer --pipeinfer.stages=99 | stage=99
        --decoder=pipeinfer --pipeinfer.tensor=99 | tensor=99
        --decoder=pipeinfer --pipeinfer.layers=5,5 | (5, 5)
        --decoder=pipeinfer --pipeinfer.width=-1 --draft=lookup | width=-1
        --decoder=pipeinfer --pipeinfer.levels=0 | levels=0
        --decoder=pipeinfer --pipeinfer.window=0 | window=0
        --decoder=pipeinfer --pipeinfer.accept=nan | accept=nan
        --decoder=pipeinfer --pipeinfer.adapt | --pipeinfer.adapt
        --max_new_tokens=0 | max_new_tokens=0
        --max_new_tokens={HUGE} | max_new_tokens={HUGE}
        --temperature=nan | temperature=nan
        --temperature=inf | temperature must be finite
        --top_k=5 | top_k=5
        --temperature=1 --top_k=-1 | top_k must be at least 0, got -1
        --temperature=1 --top_p=2 | top_p must be from 0 to 1, got 2.0
        --temperature=1 --min_p=nan | min_p must be from 0 to 1, got nan
        --logit_bias=x:1 | 'x:1'
        --logit_bias=72 | '72'
        --logit_bias=72:1,72:2 | '72:2'
        --logit_bias=72:inf | logit_bias
        --logit_bias={HUGE}:1 | logit_bias
        --stop= | ['']
        --ticks=0 | ticks=0
        --seed=-1 | seed=-1
        --system=x | --system
        --chat | chat template
        --report=x | --report
        --decoder=lookup --lookup.length=0 | length=0
        --decoder=lookup --lookup.min_ngram=9 | min_ngram=9
        --lookup.length=3 | --lookup.length
        --model= | config.json
        --model=ENCODER | causal
        --model=no/folder/here | no/folder/here""",
}
CASES = [
    (script, *(part.strip() for part in line.rsplit(" | ", 1)))
    for script, lines in FLAGS.items()
    for line in lines.strip().splitlines()
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a decoder and one with an encoder."""
    folder = tmp_path_factory.mktemp("models")
    for name, model, tokenizer in (
        ("decoder", tiny_decoder(vocab_size=260, max_len=256), ByteTokenizer()),
        ("encoder", tiny_encoder(), None),
    ):
        hub.save(model, model.init(jax.random.key(0)), folder / name, tokenizer=tokenizer)
    return folder


@pytest.mark.parametrize("script, words, says", CASES)
def test_a_malformed_flag_is_refused(script, words, says, tmp_path, monkeypatch, models):
    monkeypatch.chdir(tmp_path)
    no_training(monkeypatch)
    words = words.replace("ENCODER", str(models / "encoder"))
    first = {"federate": DIGITS, "generate": f"--model={models / 'decoder'}", "pretrain": DIGITS}
    if script == "generate" and "--prompt" not in words:
        words = f"--prompt=a {words}"
    if script == "pretrain":
        first["pretrain"] = "--data=digits"
    check_refused(script, f"{first.get(script, '')} {words}", says)


CONFIGS = [
    ("{", "not JSON"),
    ("[]", "list"),
    (b"\xff\xfe", "not JSON"),
    ('{"rounds": "x"}', "rounds='x'"),
    ('{"rounds": 0}', "rounds=0"),
    ('{"data": 5}', "data=5"),
    ('{"data": {"beta": null}}', "data.beta=None"),
    ('{"cohrt": 5}', "cohort"),
    ('{"tiers": [1, "x"]}', "tiers='x'"),
    ('{"model": {"family": 7}}', "model.family=7"),
]


@pytest.mark.parametrize("content, says", CONFIGS)
def test_a_malformed_config_is_refused(content, says, tmp_path):
    path = tmp_path / "c.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    check_refused("federate", f"--config={path}", says)


def test_every_script_refuses_malformed_flags():
    assert {script for script, _, _ in CASES} == set(SCRIPTS)


def test_a_late_error_ends_a_script_with_one_sentence(tmp_path):
    """Also that of a user's own algorithm, which is read before any flag."""
    (tmp_path / "own.py").write_text("import nothing_of_this_name\n")
    run = lambda *words: subprocess.Popen(
        [sys.executable, "-m", "jaxfm.launch.federate", "--data=digits", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
    )  # fmt: skip
    late, own = run("--data.num_clients=2000"), run("--algorithm=own.py")
    _, error = late.communicate()
    assert late.returncode == 2
    assert error.splitlines()[-1].startswith("error: data.source=digits: 1297 examples cannot give")
    assert "Traceback" not in error
    _, error = own.communicate()
    assert own.returncode == 2 and "Traceback" not in error
    assert error.startswith("error: own.py cannot be run (ModuleNotFoundError")

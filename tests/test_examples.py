"""Tests of examples/: the six edits and nothing else, the same training as our GPT's, and what the checker says."""
import difflib
import re
import sys
from pathlib import Path

import pytest
import torch

from model import GPT, GPTConfig, role_of

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / 'examples'))
import measure  # noqa: E402
import plain_gpt  # noqa: E402
import plain_gpt_completep  # noqa: E402

BASE = dict(vocabulary=64, context=16)
LARGE = dict(BASE, depth=4, width=96, heads=3)  # two heads at the base, so that head_dim changes: edit 4 acts
OURS = {  # model.py's name for each of the examples'
    r'tokens\.': 'transformer.wte.', r'positions\.': 'transformer.wpe.', r'blocks\.(\d+)\.': r'transformer.h.\1.',
    r'norm_([12])\.': r'ln_\1.', r'\bnorm\.': 'transformer.ln_f.', r'qkv\.': 'attn.c_attn.', r'out\.': 'attn.c_proj.',
    r'up\.': 'mlp.c_fc.', r'down\.': 'mlp.c_proj.', r'head\.': 'lm_head.'}


def our_name(name):
    for theirs, ours in OURS.items():
        name = re.sub(theirs, ours, name)
    return name


def our_gpt(model, parameterization):
    """model.py's GPT of the same shape, with the weights of an example's model."""
    c = model.config
    config = GPTConfig(vocab_size=c.vocabulary, block_size=c.context, n_layer=c.depth, n_embd=c.width,
                       head_dim=c.width // c.heads, base_n_layer=2, base_n_embd=32, base_head_dim=16,
                       init_std=c.init_std, parameterization=parameterization)
    ours = GPT(config)
    ours.load_state_dict({our_name(name): p for name, p in model.state_dict().items()})
    return ours


def batches(count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(BASE['vocabulary'], (count, 4, BASE['context'] + 1), generator=generator)
    return [(each[:, :-1], each[:, 1:]) for each in ids]


def hunks():
    """[(removed lines, added lines)] of the diff between the two files."""
    texts = [(ROOT / 'examples' / f'{name}.py').read_text().splitlines() for name in
             ('plain_gpt', 'plain_gpt_completep')]
    codes = difflib.SequenceMatcher(a=texts[0], b=texts[1], autojunk=False).get_opcodes()
    return [(texts[0][a:b], texts[1][c:d]) for tag, a, b, c, d in codes if tag != 'equal']


def test_the_diff_is_the_six_edits():
    """Every hunk names its edit, every edit is there once; besides, the base that all of them need and an import."""
    named = [re.findall(r'# (?:for )?edits? (\d(?: to \d)?)', '\n'.join(added)) for _, added in hunks()]
    assert sorted(sum(named, [])) == ['1', '1 to 6', '2', '3', '4', '5', '5', '6'], named  # 5: with its import
    assert all(named), hunks()
    assert [removed[0].strip() for removed, _ in hunks() if removed] == [
        'y = F.scaled_dot_product_attention(q, k, v, is_causal=True)',
        'x = x + self.attention(self.norm_1(x))',
        'nn.init.normal_(p, std=c.init_std)',
        'logits = self.head(self.norm(x))',
        'return torch.optim.AdamW(model.parameters(), lr, (0.9, 0.95), eps, weight_decay)',
        "group['lr'] = lr * fraction"]
    docs = (ROOT / 'docs' / 'rules.md').read_text()
    assert re.findall(r'^(\d)\. \*\*', docs.partition('in six edits')[2], flags=re.M) == list('123456')


@pytest.mark.parametrize('shape', [dict(), LARGE], ids=['base', 'large'])
def test_the_completep_example_is_our_gpt(shape, weight_decay=0.3):
    """Logits, loss, and the weights after three steps of AdamW with a schedule. In float64: the biases of the keys have
    a gradient of zero, and in float32 Adam would make steps of what rounding leaves of it."""
    torch.manual_seed(0)
    model = plain_gpt_completep.GPT(plain_gpt_completep.Config(**BASE | shape)).double()
    ours, data = our_gpt(model, 'completep').double(), batches()
    with torch.no_grad():
        for p in (*model.parameters(), *ours.parameters()):  # gains and biases that are not 1 and 0
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=p.dtype))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.testing.assert_close(model(data[0][0]), ours(data[0][0])[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(*data[0]), ours(*data[0])[1], rtol=1e-5, atol=1e-5)

    plain_gpt_completep.train(model, data, lr=0.01, weight_decay=weight_decay)
    optimizer = ours.configure_optimizers(weight_decay, 0.01, (0.9, 0.95), 1e-8, 'cpu')
    for fraction, batch in zip((1, 2 / 3, 1 / 3), data):
        for group in optimizer.param_groups:
            group['lr'] = 0.01 * group['lr_scale'] * fraction
        ours(*batch)[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    theirs = dict(ours.named_parameters())
    for name, p in model.named_parameters():
        assert not torch.equal(p, start[name])
        torch.testing.assert_close(p, theirs[our_name(name)], rtol=1e-5, atol=1e-5)


def test_the_groups_have_our_values():
    """lr, weight decay and eps of each parameter: three steps of AdamW hardly see eps."""
    model = plain_gpt_completep.GPT(plain_gpt_completep.Config(**LARGE))
    groups = {role_of(our_name(name)): group for group in plain_gpt_completep.make_optimizer(model, 0.01).param_groups
              for name, p in model.named_parameters() if any(p is each for each in group['params'])}
    optimizer = our_gpt(model, 'completep').configure_optimizers(0.1, 0.01, (0.9, 0.95), 1e-8, 'cpu')
    for ours in optimizer.param_groups:
        for key in ('lr', 'lr_scale', 'weight_decay', 'eps', 'betas'):
            assert groups[ours['role']][key] == pytest.approx(ours[key], rel=1e-12), (ours['role'], key)


def test_init_follows_the_rules():
    torch.manual_seed(0)
    config = plain_gpt_completep.Config(width=256, heads=16, depth=4, init_std=0.1, embedding_std=0.5)
    model = plain_gpt_completep.GPT(config)
    rules = our_gpt(model, 'completep').config.rules
    for name, p in model.named_parameters():
        role = role_of(our_name(name))
        if p.dim() == 2:
            base = config.embedding_std if role == 'embedding' else config.init_std
            assert p.std().item() == pytest.approx(base * rules[role].init_std, rel=0.05), name
        else:
            assert (p == (1 if 'norm' in name and name.endswith('weight') else 0)).all()


def test_at_the_base_both_train_the_same_bit_for_bit():
    """Without weight decay: the plain file's one group also decays norms and biases."""
    trained = []
    for file in (plain_gpt, plain_gpt_completep):
        torch.manual_seed(0)
        model = file.GPT(file.Config(**BASE))
        file.train(model, batches(), lr=0.01, weight_decay=0.0)
        trained.append(model.state_dict())
    assert all(torch.equal(trained[0][name], p) for name, p in trained[1].items())


def test_a_parameter_without_a_role_is_an_error():
    model = plain_gpt_completep.GPT(plain_gpt_completep.Config(**BASE))
    model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="'extra.weight' fits 0 roles"):
        plain_gpt_completep.make_optimizer(model, 0.01)


@pytest.mark.parametrize('axis, sizes', [('width', (64, 128, 256)), ('depth', None)])
def test_the_checker_passes_one_and_fails_the_other(axis, sizes):
    report = measure.check_coordinates(axis, 'completep', control='sp', sizes=sizes)
    assert report.verdict == 'PASS', report
    report.treatment, report.control, report.names = report.control, [], ('sp',)  # judged by the same bands
    assert report.verdict == 'FAIL', report


def test_the_drift_is_measured(monkeypatch, capsys):
    """The command, on a few steps: a line for each file and axis; the losses are those of a run on the same text."""
    monkeypatch.setattr(measure, 'STEPS', 2)
    monkeypatch.setattr(measure, 'RATES', [2**-8, 2**-7])
    monkeypatch.setattr(measure, 'TRAINED', dict(depth=(1, 2)))
    measure.print_drifts()
    out = capsys.readouterr().out
    assert len(re.findall(r'octaves', out)) == 2
    base = measure.loss_after_training(plain_gpt, measure.config_of(plain_gpt, 'depth', 2), 2**-8, seed=1, steps=2)
    assert f'{base:.3f}' in out

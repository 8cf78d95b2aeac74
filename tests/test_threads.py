"""Several threads and one model: every map is right, nobody waits forever, and nothing is left behind."""

import gc
import os
import random
import signal
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from benchmarks.threads import ARRANGEMENTS, MODELS, Small, Wrapper, at_once
from tests.same import close
from torch import nn

import sightline as sl
from sightline.explainers import Explainer, grad_cam
from sightline.explainers.evidence import gather
from sightline.inference import exact, untouched
from sightline.inference.turns import line
from sightline.metrics import max_sensitivity

pytestmark = pytest.mark.usefixtures("unchecked")  # the type checker draws random numbers of its own
SOON = 60.0  # seconds; what takes longer hangs


@pytest.fixture(autouse=True)
def nobody_is_left_in_line():
    yield
    assert not line()


@pytest.fixture
def images():
    return torch.linspace(-1, 1, 3 * 8 * 8).reshape(1, 3, 8, 8)


def small():
    torch.manual_seed(0)
    return Small()


@pytest.mark.parametrize(
    ("name", "arrangement"), [*(("small", each) for each in ARRANGEMENTS), ("transformer", "one model")]
)
def test_maps_of_four_threads_are_right_and_the_models_unharmed(name, arrangement):
    outcome = at_once(MODELS[name], arrangement, 2)
    assert outcome.right == outcome.calls and outcome.is_unharmed, outcome


def test_a_model_is_free_for_the_same_thread(images):
    model = small()
    expected = sl.explain(model, images, 1)["grad_cam"]

    @Explainer
    def again(images, targets, score):
        assert close(expected, sl.explain(score.model, images, 1)["grad_cam"])
        return grad_cam(Wrapper(score.model), images, targets)

    assert close(expected, sl.explain(model, images, 1, [again])["again"])
    sensitivity = max_sensitivity(model, images, torch.tensor([1]), grad_cam, samples=2)
    assert sensitivity.isfinite().all()


def test_a_suspended_generator_keeps_nobody_waiting(images):
    model = small()
    needs = frozenset({"activations", "mean_gradients"})
    targets = torch.arange(4).expand(1, 4)
    blocks = gather(model, images, [(None, needs)], targets).blocks()
    assert next(blocks)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(sl.explain, model, images).result(SOON)["grad_cam"].isfinite().all()


def test_two_threads_that_wait_for_each_other_are_told_so(images):
    one, other = small(), small()
    both = threading.Barrier(2)

    def explain_inside(outer, inner):
        def score(output):
            both.wait(SOON)
            sl.explain(inner, images)
            return output[:, 0]

        return sl.explain(outer, images, score)

    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(explain_inside, one, other), pool.submit(explain_inside, other, one)]
        errors = [answer.exception(SOON) for answer in answers]
    failed = [error for error in errors if error is not None]
    assert len(failed) == 1 and type(failed[0]) is RuntimeError
    assert str(failed[0]).startswith("expected threads that use one model inside a call with another")
    assert one.training and other.training


def test_a_thread_with_a_turn_overtakes_those_that_wait_for_it(images):
    one, other = small(), small()
    waiting = threading.Event()

    def wait_for_both():
        waiting.set()
        with untouched(nn.ModuleList([one, other])):
            return [turn.thread for turn in line()]

    with ThreadPoolExecutor(1) as pool:
        with untouched(one):
            answer = pool.submit(wait_for_both)
            waiting.wait(SOON)
            while len(line()) < 2:
                time.sleep(0.001)
            assert sl.explain(other, images)["grad_cam"].isfinite().all()
            assert not answer.done()
        assert len(answer.result(SOON)) == 1


def test_turns_are_taken_in_the_order_of_asking():
    model = small()
    order = []

    def ask(number):
        with untouched(model):
            order.append(number)

    with ThreadPoolExecutor(5) as pool:
        with untouched(model):
            answers = []
            for number in range(5):
                answers.append(pool.submit(ask, number))
                while len(line()) < number + 2:
                    time.sleep(0.001)
        for answer in answers:
            answer.result(SOON)
    assert order == [0, 1, 2, 3, 4]


def test_models_that_share_nothing_do_not_wait(images):
    model = small()
    with ThreadPoolExecutor(1) as pool, untouched(model):
        assert pool.submit(sl.explain, small(), images).result(SOON)["grad_cam"].isfinite().all()


def test_a_deleted_model_is_forgotten(images):
    model = small()
    sl.explain(model, images)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def crossing(begin_one, begin_other):
    """Two contexts of two threads, of which the first to begin is the first to end."""
    begun, may_end = threading.Event(), threading.Event()

    def other():
        with begin_other():
            begun.set()
            may_end.wait(SOON)

    thread = threading.Thread(target=other)
    with begin_one():
        thread.start()
        begun.wait(SOON)
    yield
    may_end.set()
    thread.join()


def test_the_precision_of_a_gpu_is_put_back_by_the_last_one():
    assert torch.backends.cudnn.allow_tf32
    middle = crossing(exact, exact)
    next(middle)
    assert not torch.backends.cudnn.allow_tf32
    next(middle, None)
    assert torch.backends.cudnn.allow_tf32


def test_random_states_are_put_back_by_the_last_one():
    class Drawing(nn.Module):
        def forward(self, x):
            return torch.rand(()) + np.random.rand() + random.random()

    def drawn(model):
        context = untouched(model)
        begin = context.__enter__

        class Running:
            def __enter__(self):
                begin()(0)

            def __exit__(self, *error):
                model(0)
                context.__exit__(*error)

        return Running()

    before = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    middle = crossing(partial(drawn, Drawing()), partial(drawn, Drawing()))
    next(middle)
    next(middle, None)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (str(np.random.get_state()), random.getstate())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_does_not_wait_for_threads_it_does_not_have(images):
    model = small()
    model.c1.register_forward_hook(lambda module, inputs, output: None)
    begun, may_end = threading.Event(), threading.Event()

    def hold():
        with exact(), untouched(model):
            model.c2.register_forward_hook(lambda module, inputs, output: None)
            begun.set()
            may_end.wait(SOON)

    thread = threading.Thread(target=hold)
    thread.start()
    begun.wait(SOON)
    child = os.fork()
    if not child:
        unharmed = model.training and len(model.c1._forward_hooks) == 1 and not model.c2._forward_hooks
        unharmed = unharmed and torch.backends.cudnn.allow_tf32 and not line()
        with untouched(model):
            unharmed = unharmed and not model.training
        os._exit(0 if unharmed else 1)
    deadline = time.monotonic() + SOON
    while not (ended := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < deadline:
        time.sleep(0.01)
    if not ended[0]:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    may_end.set()
    thread.join()
    assert ended[0] == child and os.waitstatus_to_exitcode(ended[1]) == 0
    assert model.training and not model.c2._forward_hooks


def test_an_interrupt_ends_the_wait():
    model = small()
    begun, may_end = threading.Event(), threading.Event()

    def hold():
        with untouched(model):
            begun.set()
            may_end.wait(SOON)

    thread = threading.Thread(target=hold)
    thread.start()
    begun.wait(SOON)
    timer = threading.Timer(0.1, partial(os.kill, os.getpid(), signal.SIGINT))
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            timer.start()
            with untouched(model):
                pass
        assert [turn.thread for turn in line()] == [thread.ident]
    finally:
        signal.signal(signal.SIGINT, handler)
        may_end.set()
        thread.join()
    assert model.training

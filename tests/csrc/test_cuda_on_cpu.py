"""The CUDA half of the extension, emulated on a CPU: right in any order of its threads, and clean under sanitizers."""

import pytest

from tests.csrc import cuda_on_cpu

pytestmark = pytest.mark.skipif(bool(cuda_on_cpu.missing()), reason=cuda_on_cpu.missing())

BARRIER = "__syncthreads();"
FAULTS = {
    "no barrier before sums are read": lambda source: without(source, f"  {BARRIER}\n", "\n"),
    "no barrier between workers": lambda source: without(source, f"sync() const {{ {BARRIER} }}", "sync() const {}"),
    "shared memory one double short": lambda source: without(
        source, "small_workspace(d) *", "(small_workspace(d) - 1) *"
    ),
    "a block more than there are pairs": lambda source: without(
        source, "unsigned(pairs.size(0))", "unsigned(pairs.size(0) + 1)"
    ),
}


def without(source, part, other):
    """Return the source with the last occurrence of a part replaced, if it has it."""
    return other.join(source.rsplit(part, 1))


def needs(sanitizer):
    return pytest.mark.skipif(
        not cuda_on_cpu.missing() and cuda_on_cpu.runtime(sanitizer) is None, reason=f"g++ has no {sanitizer}"
    )


def assert_clean(done, least=20):
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.rstrip().endswith("0 failures")
    assert done.stdout.count("ok d=") >= least


def test_translation():
    source = "__global__ void f(int* x);\nf<float><<<n, dim3(2, 3), bytes, stream>>>(g(x, y), z);"
    assert "emulated::run(dim3(n), dim3( dim3(2, 3)),  bytes, [&] { f<float>(g(x, y), z); })" in cuda_on_cpu.translate(
        source
    )


@pytest.mark.build
@needs("asan")
@pytest.mark.parametrize("seed", [0, 1])
def test_clean_and_right_under_address_sanitizer(seed):
    library = cuda_on_cpu.build(cuda_on_cpu.ADDRESS)
    environment = {"FASTGAN_EMULATED_SEED": str(seed)}
    assert_clean(cuda_on_cpu.check(library, sanitizer="asan", environment=environment), least=100)


@pytest.mark.build
@needs("asan")
def test_right_within_a_cuda_graph():
    library = cuda_on_cpu.build(cuda_on_cpu.ADDRESS)
    operators = ("--operators", "nuclear_norm,sqrtm,small_trace", "--dims", "3,33")
    environment = {"FASTGAN_EMULATED_CAPTURE": "1"}
    assert_clean(cuda_on_cpu.check(library, *operators, sanitizer="asan", environment=environment))


@pytest.mark.build
@needs("tsan")
def test_no_race_under_thread_sanitizer():
    library = cuda_on_cpu.build(cuda_on_cpu.THREAD)
    assert_clean(cuda_on_cpu.check(library, *cuda_on_cpu.RACES, sanitizer="tsan"))


@pytest.mark.build
@needs("asan")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault):
    library = cuda_on_cpu.build(cuda_on_cpu.ADDRESS, FAULTS[fault])
    assert library != cuda_on_cpu.build(cuda_on_cpu.ADDRESS)
    done = cuda_on_cpu.check(library, "--operators", "small_trace,nuclear_norm", "--dims", "7,33", sanitizer="asan")
    assert done.returncode != 0, done.stdout

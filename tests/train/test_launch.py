"""The files for `accelerate launch`: Accelerate reads each, and the one for CPUs starts two processes."""

import json
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from snlp_zoo import registry

FILES = {  # distributed type, machines, processes
    "cpu": ("MULTI_GPU", 1, 2),
    "one_gpu": ("NO", 1, 1),
    "multi_gpu": ("MULTI_GPU", 1, 2),
    "fsdp2": ("FSDP", 1, 2),
    "two_nodes": ("MULTI_GPU", 2, 16),
}


def folder() -> Path:
    return registry.zoo_folder() / "accelerate"


def test_every_file_is_here():
    assert {path.stem for path in folder().iterdir()} == FILES.keys()


@pytest.mark.parametrize("name", FILES)
def test_accelerate_reads_it(name):
    config = load_config_from_file(str(folder() / f"{name}.yaml"))
    assert (config.distributed_type.value, config.num_machines, config.num_processes) == FILES[name]
    assert config.mixed_precision == "no"


def test_the_launcher_asks_for_fsdp2():
    arguments = ["--config_file", str(folder() / "fsdp2.yaml"), "-m", "snlp_zoo", "doctor"]
    found, _, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    environment = prepare_multi_gpu_env(found)
    wanted = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    }
    assert {key: environment[key] for key in wanted} == wanted
    assert found.nproc_per_node == "2"


def test_two_processes_are_launched_on_cpus_and_one_of_them_writes(python, environment, make_recipe, trained, tmp_path):
    launch = ("-m", "accelerate.commands.launch", "--config_file", str(folder() / "cpu.yaml"), "-m", "snlp_zoo")
    recipe = make_recipe(train={"batch_size": 8, "epochs": 1, "save_steps": 6})
    arguments = ("distill", str(recipe), "--output-dir", str(tmp_path / "run"), "--json")
    done = python(*launch, *arguments, env=environment | {"ACCELERATE_USE_CPU": "true"})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["name"] == "tiny"  # one document
    progress = tmp_path / "run" / "checkpoints" / "step_0000006" / "progress.json"
    assert json.loads(progress.read_text())["processes"] == 2


@pytest.mark.slow
def test_a_mistake_is_said_once(python, environment, make_recipe, tmp_path):
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "snlp_zoo")
    recipe = make_recipe(teacher={"name": "/nowhere"})
    done = python(*launch, "distill", str(recipe), env=environment | {"ACCELERATE_USE_CPU": "true"})
    assert done.returncode != 0
    assert done.stderr.count("snlp-zoo: teacher folder '/nowhere' does not exist") == 1

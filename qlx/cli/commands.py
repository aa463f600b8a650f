"""The list of commands, each loaded from its own module when it is asked for."""

import importlib

import click

from qlx import __version__

# Command → module, in the order in which a model passes through them.
MODULES = {
    "train": "qlx.cli.train",
    "save-adapter": "qlx.cli.save_adapter",
    "load-adapter": "qlx.cli.load_adapter",
    "merge": "qlx.cli.merge",
    "pack": "qlx.cli.pack",
    "export-onnx": "qlx.cli.export_onnx",
    "verify": "qlx.cli.verify",
    "eval": "qlx.cli.eval",
    "serve": "qlx.cli.serve",
    "inspect": "qlx.cli.inspect",
    "plan": "qlx.cli.plan",
    "migrate": "qlx.cli.migrate",
}


class LazyGroup(click.Group):
    """A group whose commands are imported one by one, on demand."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All command names, in the order of the work."""
        return list(MODULES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The `command` of the module that belongs to `cmd_name`, or None if there is none."""
        if cmd_name not in MODULES:
            return None
        command = importlib.import_module(MODULES[cmd_name]).command
        assert isinstance(command, click.Command)
        return command


@click.group(
    cls=LazyGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="qlx")
@click.pass_context
def program(ctx: click.Context) -> None:
    """Fine-tune, merge, pack and export models in steps that prove they did not change the model."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())

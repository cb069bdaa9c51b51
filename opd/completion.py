"""Tab completion: `eval "$(opd completion bash)"` in ~/.bashrc, and the same for zsh and fish.

The scripts ask `opd completion --query LINE`, with the line up to the cursor, for the words that can stand at its end, one per line.
After `opd train` these come from Hydra's own completion of groups, choices and options.
"""

import re
import shlex
import sys
from collections.abc import Sequence
from enum import Enum
from pathlib import Path

from opd import cli, errors
from opd.arguments import targets

BASH = r"""_opd() {
    local line=${COMP_LINE:0:COMP_POINT} IFS=$'\n' word
    COMPREPLY=($("${COMP_WORDS[0]}" completion --query "$line" 2>/dev/null))
    word=${line##*[[:space:]]}
    word=${word%"${word##*[$COMP_WORDBREAKS]}"}  # readline replaces only what stands behind the last of these characters
    COMPREPLY=("${COMPREPLY[@]#"$word"}")
    [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[=./] ]] && compopt -o nospace
}
complete -o default -F _opd opd"""

ZSH = r"""(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
_opd() {
    local -a replies
    replies=("${(@f)$(${~words[1]} completion --query "${(j: :)words[1,CURRENT-1]} $PREFIX" 2>/dev/null)}")
    if (( ! $#replies[1] )); then
        compset -P '*='
        _files
        return
    fi
    compadd -S '' -- ${(M)replies:#*[=./]}
    compadd -- ${replies:#*[=./]}
}
compdef _opd opd"""

FISH = r"""function __opd_complete
    set -l words (commandline -opc)
    $words[1] completion --query (commandline -cp) 2>/dev/null
end
complete -c opd -f -a '(__opd_complete)'"""

SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}
# Verbs that take options as `opd train` does, and their own flags.
WITH_CONFIG: dict[str, tuple[str, ...]] = {
    "train": (),
    "doctor": ("--json", "--prompts"),
    "eval": ("--json", "--teacher", "--baseline", "--out"),
    "sample": ("--json", "--teacher", "--prompt", "--file", "--samples"),
    "score": ("--json", "--teacher", "--prompt", "--file", "--text", "--html"),
}
KINDS = ("models", "data", "experiments", "runs")
USAGE = """Usage: opd completion bash|zsh|fish

Prints a script for the shell. Once, for this terminal:
  eval "$(opd completion bash)"
  eval "$(opd completion zsh)"
  opd completion fish | source
For every new terminal, put the line into ~/.bashrc, ~/.zshrc or ~/.config/fish/config.fish."""


def query(line: str) -> list[str]:
    """The words that can stand in place of the last one of `line`, which may be empty. A line that cannot be read has none."""
    words = line.split()
    last = words.pop() if words and not line[-1].isspace() else ""
    if len(words) < 2:
        candidates = [*cli.VERBS] if words else []
    elif words[1] in WITH_CONFIG:
        flags = WITH_CONFIG[words[1]]
        before = words[2:] if words[1] == "train" else targets([word for word in words[2:] if word not in flags])[1]
        candidates = [*train_words(before, last), *(flags if last.startswith("-") else ())]
    elif words[1] == "ls":
        candidates = [*KINDS, "--json"]
    elif words[1] == "cp":
        candidates = [f"{group}/{name}" for group, names in choices().items() for name in names]
    elif words[1] == "completion":
        candidates = [*SCRIPTS]
    else:
        candidates = []
    return [candidate for candidate in candidates if candidate.startswith(last)]


def choices() -> dict[str, list[str]]:
    """The shipped groups and the names of their files."""
    from opd.mistakes import choices as shipped

    return shipped()


def train_words(before: list[str], last: str) -> list[str]:
    """What Hydra, and the types of the options, know about the argument `last` of `opd train` after the arguments `before`."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.utils import create_config_search_path, get_args_parser
    from hydra.core.config_search_path import SearchPathQuery
    from hydra.core.utils import setup_globals
    from hydra.errors import HydraException
    from hydra.plugins.completion_plugin import DefaultCompletionPlugin
    from hydra.version import setbase
    from omegaconf.errors import OmegaConfBaseException

    from opd.config import store

    parser = get_args_parser()
    if last.startswith("-"):
        return [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
    key, equals, _ = last.partition("=")
    if equals and (values := option_values(key)):
        return [f"{key}={value}" for value in values]
    try:
        parsed = parser.parse_intermixed_args(before)
    except SystemExit:
        return []
    extra = [Path(parsed.config_dir)] if parsed.config_dir is not None else []
    setbase("1.3")
    setup_globals()
    store.register(extra)
    search_path = create_config_search_path(str(store.conf_dir()))
    for folder in extra:
        search_path.prepend("command-line", f"file://{folder.resolve()}", SearchPathQuery(provider="schema"))
    plugin = DefaultCompletionPlugin(ConfigLoaderImpl(search_path))
    try:
        found = plugin._query("config", " ".join([*(["-m"] if parsed.multirun else []), *parsed.overrides, last]))
    except (HydraException, OmegaConfBaseException, ValueError):
        return []
    if equals:
        return [word for word in found if not word.endswith("=")]  # Hydra offers betas=0= for a list
    return [word for word in found if last.lstrip("+~").startswith("h") or not re.match(r"[+~]?hydra\b", word)]


def option_values(key: str) -> list[str]:
    """All values of an option that has a few; empty for the others."""
    from opd.mistakes import options

    kind = options().get(key)
    if kind is bool:
        return ["true", "false"]
    if isinstance(kind, type) and issubclass(kind, Enum):
        return [member.name for member in kind]
    return []


def main(argv: Sequence[str]) -> int:
    """Print the script of a shell, or the answer to one of its queries; returns the exit code."""
    match list(argv):
        case ["--query", line]:
            print("\n".join(query(line)))
            return errors.OK
        case [shell] if shell in SCRIPTS:
            print(SCRIPTS[shell])
            return errors.OK
        case ["--help" | "-h"]:
            print(USAGE)
            return errors.OK
        case _:
            print(f"opd: error: completion {shlex.join(argv)}: name one of {', '.join(SCRIPTS)}", file=sys.stderr)
            return errors.USAGE

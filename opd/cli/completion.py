"""Tab completion: `eval "$(opd completion bash)"` in ~/.bashrc, and the same for zsh and fish.

The scripts ask `opd completion --query LINE`, with the line up to the cursor, for the words that can stand at its end, one per line.
After `opd train` these come from Hydra's own completion of groups, choices and options.
"""

import re
import shlex
import signal
import sys
from collections.abc import Sequence
from enum import Enum
from importlib import import_module
from pathlib import Path

from opd import errors
from opd.cli import main as cli
from opd.cli.arguments import targets

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
WITH_CONFIG = ("train", "doctor", "eval", "sample", "score")  # verbs that take options
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
    else:
        own = flags(words[1])
        candidates = [*arguments(words[1], [word for word in words[2:] if word not in own], last), *(own if last.startswith("-") else ())]
    return [candidate for candidate in candidates if candidate.startswith(last)]


def arguments(verb: str, before: list[str], last: str) -> list[str]:
    """What can stand at `last` behind the words `before`, besides the verb's own flags."""
    if verb in WITH_CONFIG:
        return option_words(before if verb == "train" else targets(before)[1], last)
    if verb == "ls":
        from opd.cli.ls import KINDS

        return list(KINDS)
    if verb == "cp":
        from opd.cli.hydra_errors import choices

        return [f"{group}/{name}" for group, names in choices().items() for name in names]
    return [*SCRIPTS] if verb == "completion" else []


def flags(verb: str) -> list[str]:
    """The verb's own flags; none of a word that is no verb."""
    if verb not in cli.VERBS:
        return []
    parser = vars(import_module(cli.VERBS[verb].target.partition(":")[0])).get("parser")
    return [] if parser is None else [option for action in parser()._actions for option in action.option_strings if option.startswith("--")]


def option_words(before: list[str], last: str) -> list[str]:
    """What Hydra, and the types of the options, know about the argument `last` of `opd train` after the arguments `before`."""
    from hydra._internal.utils import get_args_parser
    from hydra.errors import HydraException
    from hydra.plugins.completion_plugin import DefaultCompletionPlugin
    from omegaconf.errors import OmegaConfBaseException

    from opd.config import compose as store

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
    extra = Path(parsed.config_dir) if parsed.config_dir is not None else None
    plugin = DefaultCompletionPlugin(store.loader(extra))
    store.register([] if extra is None else [extra])
    try:
        found = plugin._query("config", " ".join([*(["-m"] if parsed.multirun else []), *parsed.overrides, last]))
    except (HydraException, OmegaConfBaseException, ValueError):
        return []
    if equals:
        return [word for word in found if not word.endswith("=")]  # Hydra offers betas=0= for a list
    return [word for word in found if last.lstrip("+~").startswith("h") or not re.match(r"[+~]?hydra\b", word)]


def option_values(key: str) -> list[str]:
    """All values of an option that has a few; empty for the others."""
    from opd.cli.hydra_errors import options

    kind = options().get(key)
    if kind is bool:
        return ["true", "false"]
    if isinstance(kind, type) and issubclass(kind, Enum):
        return [member.name for member in kind]
    return []


def main(argv: Sequence[str]) -> int:
    """Print the script of a shell, or the answer to one of its queries; returns the exit code."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `opd completion bash | head -1` ends without a complaint
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

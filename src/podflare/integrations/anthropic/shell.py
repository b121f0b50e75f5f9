"""A shell that goes on from command to command, made of bash cells that pass its state on in a file.

Not a process that lives on: so its state goes along with a fork, a command that hangs or exits takes nothing with it,
and nothing has to be read from a pipe up to some mark.  What a file cannot hold does not persist: job control (`wait`,
`%1`, `$!`), descriptors that were opened with `exec`, the command history.
"""

from __future__ import annotations

from typing import Any

from podflare.errors import BadRequest
from podflare.integrations.anthropic.blocks import bounded, field, text_input
from podflare.integrations.anthropic.steps import Steps

DEFAULT_TIMEOUT_S = 120.0
STATE = "/var/tmp/.podflare-shell"

# Everything has a name of its own here: what the command sees, saves and overrides are its user's names.
_SAVE = r"""
__podflare_save() {
    __podflare_code=$?
    local __podflare_set=${SHELLOPTS//:/ } __podflare_all __podflare_word __podflare_status=$__podflare_code
    set +eux
    trap - EXIT
    {
        shopt -p | grep -vE ' (login_shell|restricted_shell)$'
        while read -r _ __podflare_word __podflare_all; do
            case $__podflare_all in __podflare_*) continue;; esac
            declare -f -- "$__podflare_all"
            case $__podflare_word in *x*) printf 'export -f -- %q\n' "$__podflare_all";; esac
        done <<< "$(declare -F)"
        printf 'builtin cd -- %q || builtin cd\n' "$PWD"
        mapfile -t __podflare_all < <(compgen -v)
        for __podflare_word in "${__podflare_all[@]}"; do
            case $__podflare_word in
                __podflare_*|_|BASH*|EUID|PPID|SHELLOPTS|UID|GROUPS|DIRSTACK|FUNCNAME|LINENO|RANDOM|SRANDOM) ;;
                SECONDS|EPOCHSECONDS|EPOCHREALTIME|PIPESTATUS|COMP_WORDBREAKS|HISTCMD|SHLVL|PWD) ;;
                *) declare -p -- "$__podflare_word";;
            esac
        done
        alias -p
        umask -p
        trap -p
        printf '__podflare_options="set +o braceexpand +o hashall +o interactive-comments'
        for __podflare_word in $__podflare_set; do
            case $__podflare_word in
                noexec) ;;
                # Nothing may fail before the command then.
                errexit) printf ' -e'; __podflare_status=0;;
                *) printf ' -o %s' "$__podflare_word";;
            esac
        done
        printf '"\n__podflare_status=%d\n' "$__podflare_status"
    } > "$__podflare_state.$$" && mv -f -- "$__podflare_state.$$" "$__podflare_state"
}
"""
_RESTORE = """
exec 2>&1
__podflare_options=: __podflare_status=0
if [ -r "$__podflare_state" ]; then
    unset $(compgen -e)
    . "$__podflare_state"
fi 2> /dev/null
trap '{ __podflare_save; } 2> /dev/null' EXIT
eval "$__podflare_options"
"""


def _script(command: str) -> str:
    """One line, so that bash counts the lines of the command alone; one group, for it is parsed before it is run."""
    prepare = _quoted(f"__podflare_state={STATE}{_SAVE}{_RESTORE}")
    status = 'if [ "$__podflare_status" != 0 ]; then (exit "$__podflare_status"); fi'
    end = '{ __podflare_save; } 2> /dev/null; exit "$__podflare_code"'
    return f"{{ eval {prepare}; {status}; eval {_quoted(command)}; {end}; }}"


def _quoted(text: str) -> str:
    return "$'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


def shell_steps(arguments: Any, timeout_s: float | None) -> Steps[tuple[str, bool]]:
    """Carry out the input of a call of `bash_20250124`; its text, and whether it is an error.

    Raises: BadRequest for an input that is none.
    """
    restart = field(arguments, "restart")
    if restart not in (None, True, False):
        raise BadRequest("input.restart must be true or false")
    if restart:
        yield lambda sandbox: sandbox.run_code(f"rm -f {STATE}", "bash")
        if field(arguments, "command") is None:
            return "The shell was restarted.", False
    command = text_input(arguments, "command", what="a string with a shell command")
    if "\0" in command:
        raise BadRequest("input.command must not contain NUL")
    limit = DEFAULT_TIMEOUT_S if timeout_s is None else timeout_s
    result = yield lambda sandbox: sandbox.run_code(_script(command), "bash", timeout=limit)
    parts = [bounded(result.stdout), result.stderr]
    if result.reason == "timed_out":
        parts.append(
            "The command and what it started were ended. The shell was restarted; it goes on with the directory, "
            "variables and functions that it had, as far as they were saved in time."
        )
    if result.exit_code:
        parts.append(f"exit_code: {result.exit_code}")
    return "\n".join(part for part in parts if part) or "(no output)", result.exit_code != 0

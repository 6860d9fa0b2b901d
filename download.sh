#!/usr/bin/env bash
# Downloads Code Llama's weights from the signed URL in Meta's e-mail: resumable, and every file checked.
# It knows nothing of Python. It needs bash 3.2 or newer, awk, GNU wget or curl, and md5sum or md5.
set -euo pipefail
set -f            # names are split at spaces below, and never matched against files
export LC_ALL=C   # bytes are bytes, and the tools answer in English

KNOWN="7b 13b 34b 70b 7b-Python 13b-Python 34b-Python 70b-Python 7b-Instruct 13b-Instruct 34b-Instruct 70b-Instruct"
FORM="https://ai.meta.com/resources/models-and-libraries/llama-downloads/"
TRIES=5           # requests in a row that bring nothing new, before a file is given up

# Prints how many shards a model has.
shards_of() {
  case $1 in
    7b | 7b-Python | 7b-Instruct) echo 1 ;;
    13b | 13b-Python | 13b-Instruct) echo 2 ;;
    34b | 34b-Python | 34b-Instruct) echo 4 ;;
    70b | 70b-Python | 70b-Instruct) echo 8 ;;
  esac
}

usage() {
  cat <<EOF_USAGE
usage: ./download.sh [-h | --help]

Downloads Code Llama models into CodeLlama-<model>/ and checks every file. Run it again to continue where it stopped.
It asks for the signed URL from Meta's e-mail and for the models. Ask for the e-mail at
$FORM

models:     $KNOWN
            separated by commas or spaces; an empty answer means all of them
GB each:    7b 12.55, 13b 24, 34b 63, 70b 131, the same for Python and Instruct

environment, instead of answers:
  PRESIGNED_URL   the signed URL, with its * (it is a credential: keep it out of your shell's history)
  MODELS          the models; set but empty means all of them
environment, optional:
  TARGET          the folder to download into (default: the current one)
  DOWNLOADER      wget or curl (default: wget if it is there)
  RETRY_DELAY     seconds before the first retry after a network error (default 5)
EOF_USAGE
}

say() { printf '%s\n' "$*"; }
warn() { printf 'download.sh: %s\n' "$*" >&2; }
die() {
  warn "$*"
  exit 1
}

size_of() {
  if [ -e "$1" ]; then echo $(($(wc -c <"$1"))); else echo 0; fi
}

# Asks on the terminal, or reads one line of standard input, into $reply. Without an answer the script ends.
ask() {
  reply=
  if [ -t 0 ]; then
    # Readline, because a terminal itself cuts lines at 1024 characters on macOS.
    IFS= read -e -r -p "$1 " reply || [ -n "$reply" ] || die "no answer, so nothing was downloaded"
  else
    IFS= read -r reply || [ -n "$reply" ] || die "standard input ended before the answer to: $1"
  fi
}

# Splits the signed URL at its * into $before and $after, and sets $host, the only part that messages may show.
split_url() {
  local url=$1 head rest
  url=${url#"${url%%[![:space:]]*}"}
  url=${url%"${url##*[![:space:]]}"}
  case $url in
    http://?* | https://?*) ;;
    *) die "the signed URL must begin with https:// (copy the text of the whole link in the e-mail)" ;;
  esac
  case $url in
    *[![:graph:]]* | *[\"\\\<\>]*)
      die "the signed URL holds a space, a quote, or another character that no URL holds: copy it again" ;;
  esac
  head=${url%%[*?#]*}
  rest=${url#"$head"}
  case $rest in
    \**) ;;
    *) die "the signed URL must have a * in its path, where the file names go: copy the text of the link in the" \
      "e-mail, not the address behind it" ;;
  esac
  before=$head
  after=${rest#?}
  host=${head#*://}
  host=${host%%/*}
  host=${host##*@}
  case $head in
    *://?*/*) [ -n "$host" ] || die "the signed URL names no host" ;;
    *) die "the signed URL names no host" ;;
  esac
}

# Reads model names, separated by commas or spaces, into $models; none means all.
choose_models() {
  local name
  models=
  for name in ${1//,/ }; do
    case $name in
      *://*) die "a URL stands where the models should" ;;   # without showing it
    esac
    [ -n "$(shards_of "$name")" ] || die "unknown model $name; known are: $KNOWN"
    case " $models " in
      *" $name "*) ;;
      *) models="$models $name" ;;
    esac
  done
  models=${models:-$KNOWN}
}

# Sets $downloader and $md5, the programs to use.
choose_tools() {
  downloader=${DOWNLOADER:-}
  case $downloader in
    wget | curl) command -v "$downloader" >/dev/null || die "DOWNLOADER is $downloader, which is not installed" ;;
    "")
      if wget --version 2>/dev/null | awk '/^GNU Wget 1/ { found = 1 } END { exit !found }'; then
        downloader=wget
      elif command -v curl >/dev/null; then
        downloader=curl
      else
        die "found neither GNU wget 1.x nor curl: install one of them"
      fi
      ;;
    *) die "DOWNLOADER must be wget or curl, not $downloader" ;;
  esac
  if command -v md5sum >/dev/null; then
    md5=md5sum
  elif command -v md5 >/dev/null; then
    md5=md5
  else
    die "found neither md5sum nor md5: install one of them (coreutils has md5sum)"
  fi
}

# Succeeds if a file's md5 is the given one.
has_md5() {
  local file=$1 expected=$2 sum
  if [ "$md5" = md5sum ]; then
    sum=$(md5sum <"$file") || die "cannot read $file"
  else
    sum=$(md5 -q "$file") || die "cannot read $file"
  fi
  [ "${sum%% *}" = "$expected" ]
}

# Succeeds if a file begins as a web page does.
is_html() {
  local start
  start=$(head -c 512 "$1" | tr '\000A-Z' '\001a-z') || die "cannot read $1"
  start=${start#$'\357\273\277'}                    # a byte order mark
  start=${start#"${start%%[![:space:]]*}"}
  case $start in
    '<!doctype'* | '<html'*) return 0 ;;
    *) return 1 ;;
  esac
}

# Runs the downloader once and sets $code (its exit status), $http (the last HTTP status, 0 without an answer) and
# $kind (the content type). The URL goes in through a pipe: arguments can be read by every user of the machine. The
# headers may repeat it after a redirect, so they stay in a private file.
request() {
  local url=$1 file=$2 options answer
  code=0
  : >"$private/headers"
  if [ "$downloader" = wget ]; then
    options=(--quiet --server-response --output-file="$private/headers" --tries=1 --timeout=60 --continue)
    if [ -t 2 ] && wget --show-progress --version >/dev/null 2>&1; then options+=(--show-progress); fi
    printf '%s\n' "$url" | wget "${options[@]}" --output-document="$file" --input-file=- || code=$?
  else
    options=(--fail --location --globoff --continue-at - --dump-header "$private/headers")
    options+=(--connect-timeout 60 --speed-limit 1 --speed-time 60)
    if [ -t 2 ]; then options+=(--progress-bar); else options+=(--silent --show-error); fi
    printf 'url = "%s"\n' "$url" | curl --config - "${options[@]}" --output "$file" || code=$?
  fi
  answer=$(awk '
    BEGIN { status = 0; kind = "unknown" }
    /^ *HTTP\/[0-9.]+ [0-9]+/ { status = $2; kind = "unknown" }
    tolower($1) == "content-type:" { kind = tolower($2) }
    END { print status, kind }' "$private/headers")
  read -r http kind <<<"$answer"
}

# Completes a file from the URL of a path: resumes what the file holds already, and retries what may pass.
fetch() {
  local path=$1 file=$2 tries=0 held most size
  most=$(size_of "$file")
  while :; do
    held=$(size_of "$file")
    request "$before$path$after" "$file"
    case $held-$http-$kind in
      0-*) ;;
      *-200-text/html*) die "$host answered with a login page instead of the rest of $path; the part of it that is" \
        "here was kept. Sign in, or ask for a new URL, then run this script again" ;;
    esac
    [ "$code" -ne 0 ] || return 0
    [ -s "$file" ] || rm -f "$file"
    case $downloader-$code in
      wget-3 | curl-23) die "could not write $file: is the disk full?" ;;
      curl-33) rm -f "$file" ;;                     # this server cannot resume: begin anew
    esac
    size=$(size_of "$file")
    case $http in
      416) if [ "$size" -gt 0 ]; then return 0; fi ;;   # nothing is missing; the md5 decides
    esac
    case $http in
      403) die "HTTP 403 from $host for $path: the signed URL has expired (it lives 24 hours and for a limited number" \
        "of downloads) or does not cover this file. Ask for a new one at $FORM and run this script again:" \
        "it continues where it stopped" ;;
      0 | 2?? | 408 | 429 | 5??) ;;
      *) die "HTTP $http from $host for $path: trying again would not help" ;;
    esac
    if [ "$size" -gt "$most" ]; then
      most=$size
      tries=0
    fi
    tries=$((tries + 1))
    [ "$tries" -lt "$TRIES" ] || die "gave up $path after $TRIES requests to $host" \
      "($downloader ended with status $code, HTTP status $http): run this script again, it continues where it stopped"
    say "$path: interrupted ($downloader status $code, HTTP status $http), trying again"
    sleep $((RETRY_DELAY * tries))
  done
}

# Brings one file into TARGET, through .part so that only a whole file has the final name. With an md5 it must agree: a
# file that does not is removed and added to $failed. Without one, a file that is there counts as whole.
get() {
  local path=$1 sum=$2 file=$TARGET/${3:-$1} resumed
  local part=$file.part
  if [ -e "$file" ] && [ -z "$sum" ] && [ -s "$file" ] && ! is_html "$file"; then
    say "$path: is here already"
    return 0
  elif [ -e "$file" ] && [ -n "$sum" ] && has_md5 "$file" "$sum"; then
    say "$path: is here already, md5 right"
    return 0
  elif [ -e "$file" ]; then
    say "$path: is here, but incomplete or wrong; downloading it"
    if [ -s "$part" ] || is_html "$file"; then rm -f "$file"; else mv -f "$file" "$part"; fi
  fi
  if [ -z "$sum" ]; then rm -f "$part"; fi          # without an md5 nothing would notice two halves that do not fit
  while :; do
    resumed=no
    if [ -s "$part" ]; then resumed=yes; fi
    say "$path: downloading"
    fetch "$path" "$part"
    [ -s "$part" ] || die "$host sent an empty file for $path"
    if is_html "$part"; then
      rm -f "$part"
      die "$host sent a login page instead of $path, so it was removed. Copy the text of the link in the e-mail, not" \
        "the address behind it; if you did, ask for a new one at $FORM"
    fi
    if [ -z "$sum" ] || has_md5 "$part" "$sum"; then
      mv -f "$part" "$file"
      return 0
    fi
    rm -f "$part"
    if [ "$resumed" = no ]; then
      warn "$path: its md5 is not the one in checklist.chk, so it was removed"
      failed="$failed $path"
      return 0
    fi
    say "$path: the resumed file has a wrong md5; downloading it from its start"
  done
}

# Prints a checklist as lines "md5 name", in lower case and without the marks of md5sum; fails if it is anything else.
read_checklist() {
  awk '
    { sub(/\r$/, "") }
    NF == 0 { next }
    NF != 2 || length($1) != 32 || $1 ~ /[^0-9A-Fa-f]/ { exit 1 }
    { sub(/^\*/, "", $2); sub(/^\.\//, "", $2); print tolower($1), $2 }' "$1"
}

# Prints the md5 of a name in $sums, the lines of read_checklist; nothing if it is not there.
sum_of() {
  awk -v name="$1" '$2 == name { print $1; exit }' <<<"$sums"
}

# Sets $sums from a model's checklist, which must name all the given shards.
load_checklist() {
  local file=$1 name
  shift
  sums=$(read_checklist "$file") || return 1
  for name in "$@"; do
    [ -n "$(sum_of "$name")" ] || return 1
  done
}

download_model() {
  local folder=CodeLlama-$1 count=$2 names="" shard name sum failed_before=$failed
  for ((shard = 0; shard < count; shard++)); do
    names="$names $(printf 'consolidated.%02d.pth' "$shard")"
  done
  mkdir -p "$TARGET/$folder"
  # shellcheck disable=SC2086  # $names is a list
  if [ -e "$TARGET/$folder/checklist.chk" ] && ! load_checklist "$TARGET/$folder/checklist.chk" $names; then
    rm -f "$TARGET/$folder/checklist.chk"
  fi
  get "$folder/checklist.chk" ""
  # shellcheck disable=SC2086
  if ! load_checklist "$TARGET/$folder/checklist.chk" $names; then
    rm -f "$TARGET/$folder/checklist.chk"
    die "$folder/checklist.chk is not a list of md5 sums that names$names, so it was removed"
  fi
  names="tokenizer.model params.json$names"
  for name in $names; do
    get "$folder/$name" "$(sum_of "$name")"
  done
  while read -r sum name; do                        # whatever else the checklist names must be right as well
    case " $names " in
      *" $name "*) continue ;;
    esac
    if [ ! -f "$TARGET/$folder/$name" ] || ! has_md5 "$TARGET/$folder/$name" "$sum"; then
      warn "$folder/$name: checklist.chk names it, but it is missing or wrong"
      failed="$failed $folder/$name"
    fi
  done <<<"$sums"
  if [ "$failed" = "$failed_before" ]; then say "$folder: complete, every md5 in checklist.chk agrees"; fi
}

main() {
  local model
  case $#:${1:-} in
    0:) ;;
    1:-h | 1:--help)
      usage
      exit 0
      ;;
    *)
      usage >&2
      warn "unknown argument: nothing but -h and --help is known"   # not shown, it may be the signed URL
      exit 2
      ;;
  esac
  TARGET=${TARGET:-.}
  case $TARGET in
    -*) TARGET=./$TARGET ;;
  esac
  RETRY_DELAY=${RETRY_DELAY:-5}
  case $RETRY_DELAY in
    *[!0-9]*) die "RETRY_DELAY must be a whole number of seconds, not $RETRY_DELAY" ;;
  esac

  reply=${PRESIGNED_URL:-}
  unset PRESIGNED_URL                               # the programs that are run need not inherit it
  if [ -z "$reply" ]; then ask "Signed URL from Meta's e-mail:"; fi
  split_url "$reply"
  if [ -n "${MODELS+set}" ]; then
    reply=$MODELS
  else
    printf '%s\n' "Models: $KNOWN" "GB each: 7b 12.55, 13b 24, 34b 63, 70b 131 (the same for Python and Instruct)" >&2
    ask "Models to download, separated by commas or spaces (empty: all of them):"
  fi
  choose_models "$reply"
  choose_tools

  private=$(mktemp -d "${TMPDIR:-/tmp}/codellama.XXXXXX")
  trap 'rm -rf "$private"' EXIT
  trap 'warn "interrupted; run this script again to continue"; exit 130' INT TERM
  mkdir -p "$TARGET"
  failed=
  get LICENSE "" CodeLlama-LICENSE                  # beside this repository's own LICENSE, not in its place
  get USE_POLICY.md "" CodeLlama-USE_POLICY.md
  for model in $models; do
    download_model "$model" "$(shards_of "$model")"
  done
  if [ -n "$failed" ]; then
    die "these files are wrong or missing:$failed. Run this script again; if they fail once more, delete the" \
      "checklist.chk beside them too"
  fi
  say "done: $(for model in $models; do printf '%s/CodeLlama-%s ' "$TARGET" "$model"; done)"
}

main "$@"

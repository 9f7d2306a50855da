#!/bin/bash
# Make the cluster at the first start, from the variables of the real image, then run what was asked for.
set -eu

from_file() { # NAME: take it from the file that NAME_FILE names, if set
    local file="$1_FILE"
    [ -z "${!file:-}" ] || export "$1=$(< "${!file}")"
}

make_cluster() {
    : "${POSTGRES_PASSWORD:?POSTGRES_PASSWORD must be set}"
    local user="${POSTGRES_USER:-postgres}"
    local database="${POSTGRES_DB:-$user}"
    initdb --username="$user" --pwfile=<(printf '%s\n' "$POSTGRES_PASSWORD") \
        --auth-local=trust --auth-host=scram-sha-256 ${POSTGRES_INITDB_ARGS:-}
    echo "host all all all ${POSTGRES_HOST_AUTH_METHOD:-scram-sha-256}" >> "$PGDATA/pg_hba.conf"
    pg_ctl --wait -o "-c listen_addresses=''" start
    [ "$database" = postgres ] || createdb --username="$user" --maintenance-db=postgres "$database"
    for script in /docker-entrypoint-initdb.d/*.sql; do
        [ ! -f "$script" ] || psql -v ON_ERROR_STOP=1 --no-psqlrc --username="$user" --dbname="$database" -f "$script"
    done
    pg_ctl --wait --mode=fast stop
}

[ "${1:0:1}" != "-" ] || set -- postgres "$@"
if [ "$1" = postgres ]; then
    if [ "$(id -u)" = 0 ]; then
        mkdir -p "$PGDATA" /run/postgresql
        chown -R postgres: "$PGDATA" /run/postgresql
        exec setpriv --reuid=postgres --regid=postgres --init-groups "$0" "$@"
    fi
    mkdir -p "$PGDATA"
    chmod 700 "$PGDATA" || true
    for name in POSTGRES_USER POSTGRES_PASSWORD POSTGRES_DB; do from_file "$name"; done
    [ -s "$PGDATA/PG_VERSION" ] || make_cluster
    unset POSTGRES_PASSWORD
fi
exec "$@"

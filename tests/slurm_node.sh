#!/usr/bin/env bash
# A SLURM of one node for tests: slurm_node.sh start|stop DIR
#
# A real munged, slurmctld and slurmd (Debian: apt-get install slurm-wlm), run as root,
# on free ports of the loopback, with configuration, keys, state, sockets and logs in
# DIR. Needs neither systemd nor cgroups, and neither reads nor writes /etc/slurm.
# Afterwards SLURM_CONF=DIR/slurm.conf is all that sbatch, squeue and the others need.
#
# Two partitions: `main`, and `urgent`, whose jobs preempt those of `main`.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin

fail() {
    echo "slurm_node.sh: $*" >&2
    exit 1
}

[ $# -eq 2 ] || fail "usage: slurm_node.sh start|stop DIR"
mkdir -p "$2"
dir=$(cd "$2" && pwd)
export SLURM_CONF=$dir/slurm.conf
socket=$dir/munge.socket

port_is_free() {
    ! (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null
}

# free_port FIRST: one of 5000, below those that the kernel hands out to others.
free_port() {
    local port
    for _ in $(seq 100); do
        port=$(($1 + RANDOM % 5000))
        if port_is_free "$port"; then
            echo "$port"
            return
        fi
    done
    fail "found no free port"
}

# wait_for SECONDS COMMAND...: until it succeeds, five times a second.
wait_for() {
    local tries=$(($1 * 5))
    shift
    for _ in $(seq "$tries"); do
        if "$@" >/dev/null 2>&1; then return; fi
        sleep 0.2
    done
    return 1
}

node_is_idle() {
    [ "$(sinfo --noheader --partition=main --format=%T)" = idle ]
}

# end NAME: at once; nobody reads the state that it would save.
end() {
    local pid
    pid=$(cat "$dir/$1.pid" 2>/dev/null) || return 0
    if [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$1" ]; then kill -KILL "$pid"; fi
}

# end_steps: what belongs to jobs, slurmstepd and the tasks; fails if there was any.
end_steps() {
    local entry found=0
    for entry in /proc/[0-9]*; do
        if [ ! -r "$entry/environ" ]; then continue; fi
        if grep -qszxF "SLURM_CONF=$SLURM_CONF" "$entry/environ" &&
            { grep -qsx slurmstepd "$entry/comm" ||
                grep -qsz '^SLURM_JOB_ID=' "$entry/environ"; }; then
            kill -KILL "${entry#/proc/}" 2>/dev/null || true
            found=1
        fi
    done
    return "$found"
}

start() {
    local program
    for program in munged slurmctld slurmd sbatch srun scontrol; do
        command -v "$program" >/dev/null ||
            fail "$program is missing (Debian: apt-get install slurm-wlm)"
    done
    [ "$(id -u)" -eq 0 ] || fail "has to be run as root"
    # slurmd's sockets, DIR/spool/NODE_JOB.STEP, are the longest; 108 is Linux's limit.
    [ ${#dir} -le 70 ] || fail "$dir is too long for the names of sockets"
    mkdir -p "$dir/state" "$dir/spool"
    # FirstJobId: JAX computes the coordinator's port from the job's id, and two tests
    # at the same time must not agree on one.
    cat >"$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=$(free_port 20000)
SlurmdPort=$(free_port 25000)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$socket
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
# No cgroups, no binding to cores, no accounting, no MPI.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
# Two CPUs, whatever the machine has.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
# Seconds between TERM and KILL; the default. Trainers write a checkpoint in them.
KillWait=30
FirstJobId=$((1 + RANDOM))
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=localhost NodeAddr=127.0.0.1 CPUs=2
PartitionName=main Nodes=localhost Default=YES PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=localhost PriorityTier=2
CONF
    (umask 077 && head --bytes=1024 /dev/urandom >"$dir/munge.key")
    # --force: DIR may be closed to other users.
    munged --force --socket="$socket" --key-file="$dir/munge.key" \
        --pid-file="$dir/munged.pid" --log-file="$dir/munged.log" \
        --seed-file="$dir/munge.seed" --num-threads=2 2>"$dir/munged.err" ||
        fail "munged does not start: $(tail --lines=5 "$dir/munged.err")"
    slurmctld || fail "slurmctld does not start: $(tail --lines=5 "$dir/slurmctld.log")"
    slurmd -N localhost ||
        fail "slurmd does not start: $(tail --lines=5 "$dir/slurmd.log")"
    wait_for 20 node_is_idle || fail "the node is not idle: $(sinfo 2>&1)
$(tail --lines=15 "$dir/slurmctld.log" "$dir/slurmd.log" 2>&1)"
}

stop() {
    # Not by scancel, which sends TERM first and waits; nothing here has to be saved.
    end slurmctld
    end slurmd
    wait_for 5 end_steps || fail "processes of jobs are left"
    end munged
}

case $1 in
start) start ;;
stop) stop ;;
*) fail "usage: slurm_node.sh start|stop DIR" ;;
esac

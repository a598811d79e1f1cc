//! From workers that are there to a generation: whether the last one goes on, when a new one forms, of whom, and from which
//! state.

use std::collections::BTreeSet;
use std::ops::Range;
use std::time::Duration;

use protocol::message::{Member, WorkerId};

use super::balance::even;
use super::{Action, Decision, GATHER_LIMIT, Membership, Phase, RETURN_LIMIT, Source, rest};

/// The shares of so many members are told one by one.
const NAMED: usize = 8;

/// Goes on in the last generation if all its members are back. Else forms one if there are enough workers: as many as
/// the run was to begin with, and as many as the last generation had while others of it may still come back; after that,
/// any that hold the run's state, or, once it has begun and some more time has passed, any at all.
pub(super) fn gathered(mut next: Membership, now: Duration, mut actions: Vec<Action>) -> Decision {
    let Phase::Gathering(returned) = &next.phase else {
        return (next, actions, String::new());
    };
    let here = next.workers.len() as u32;
    if next.world_size > 0 && returned.places.len() as u32 == next.world_size {
        return adopt(next, now, actions);
    }
    let may_come = |since: Duration| now < since + RETURN_LIMIT;
    let others_may_come = may_come(next.since) || returned.since.is_some_and(may_come);
    let wanted = if others_may_come { next.expected.max(next.world_size) } else { next.expected };
    let is_enough = here >= wanted
        || (returned.since.is_some()
            && !others_may_come
            && !(next.states.is_empty() && next.members.is_empty()))
        || (next.has_begun && here > 0 && now >= next.since + GATHER_LIMIT);
    if !is_enough {
        let reason = match actions.is_empty() {
            true => String::new(),
            false => format!("{here} of {wanted} workers are here"),
        };
        return (next, actions, reason);
    }
    if next.members.is_empty() {
        return form(next, now, actions);
    }
    let (back, of) = (next.members.len(), next.world_size);
    let why = format!("{back} of {of} workers of generation {} are back", next.generation);
    let at_work = next.members.clone();
    actions.push(Action::Abort(next.generation, at_work.clone()));
    next.enter(Phase::Stopping { at_work, why, is_blameless: false, aborted: Some(now) }, now);
    rest(next, now, actions)
}

/// All members of the last generation are back, and have never left each other.
pub(super) fn adopt(mut next: Membership, now: Duration, mut actions: Vec<Action>) -> Decision {
    let Phase::Gathering(returned) = &next.phase else { return (next, actions, String::new()) };
    let waiting = next.members.iter().copied().filter(|id| !returned.connected.contains(id)).collect();
    let (who, goes) = match next.world_size {
        1 => ("its worker is back".to_owned(), "goes"),
        all => (format!("all {all} workers are back"), "go"),
    };
    let reason = format!("generation {}: {who} and {goes} on", next.generation);
    actions.push(Action::Adopt(next.generation, next.members.clone()));
    let members: BTreeSet<WorkerId> = next.members.iter().copied().collect();
    next.states.retain(|id, _| !members.contains(id));
    next.recorded_bits = next.recorded_bits.take().or_else(|| next.bits().map(str::to_owned));
    (next.has_begun, next.formed_from) = (true, None);
    next.balancing.begin(true);
    next.enter(Phase::Formed { waiting }, now);
    (next, actions, reason)
}

/// Gives workers contiguous ranges of shards: first the members that are left, in their order, so that little moves, then
/// those that have come since. The rest stand by.
pub(super) fn form(mut next: Membership, now: Duration, mut actions: Vec<Action>) -> Decision {
    next.generation += 1;
    let mut ids = next.members.clone();
    ids.extend(next.others());
    let surplus = ids.split_off(ids.len().min(next.shards as usize));
    let world_size = ids.len() as u32;
    next.balancing.begin(ids != next.members || world_size != next.world_size);
    let (ranges, how) = dealt(&next, &ids);
    let member = |(&id, shards): (&WorkerId, Range<u32>)| {
        let worker = &next.workers[&id];
        Member { worker_id: id, name: worker.name.clone(), address: worker.address.clone(), shards }
    };
    let members = ids.iter().zip(ranges).map(member).collect();
    actions.extend(surplus.iter().map(|&id| Action::StandBy(id)));
    if !surplus.is_empty() {
        actions.push(Action::Notice(format!(
            "{} of {} workers stand by: there are only {} shards (hint: --shards {})",
            surplus.len(),
            next.workers.len(),
            next.shards,
            next.workers.len()
        )));
    }
    let source = source(&next, &ids);
    next.world_size = world_size;
    // Whatever is computed from now on is gone on with by the same bits only.
    next.recorded_bits = next.recorded_bits.take().or_else(|| next.bits().map(str::to_owned));
    let goes_back = source == Source::Disk && next.has_begun;
    next.has_begun = true;
    next.formed_from = match source {
        Source::Disk => None,
        Source::Kept(stage) | Source::Member(_, stage) => Some(stage),
    };
    actions.push(Action::Form(next.generation, members, source));
    let who = if world_size == 1 { "1 worker has".to_owned() } else { format!("{world_size} workers share") };
    let back = if goes_back { ", going back to what is on the disk" } else { "" };
    let reason = format!("generation {}: {who} {} shards{how}{back}", next.generation, next.shards);
    let members: BTreeSet<WorkerId> = ids.iter().copied().collect();
    next.states.retain(|id, _| !members.contains(id));
    next.members = ids.clone();
    next.enter(Phase::Formed { waiting: ids }, now);
    (next, actions, reason)
}

/// The shards of these members by rank, and in words how they were dealt, if not evenly.
fn dealt(state: &Membership, members: &[WorkerId]) -> (Vec<Range<u32>>, String) {
    let shares = state.balancing.deal(state.shards, members);
    let how = if shares == even(state.shards, members.len()) {
        String::new()
    } else if members.len() > NAMED {
        let (least, most) = (shares.iter().min().unwrap_or(&0), shares.iter().max().unwrap_or(&0));
        format!(" by speed: {least} to {most} each")
    } else {
        let named = |(&id, share): (&WorkerId, &u32)| format!("{} {share}", state.name(id));
        let named: Vec<String> = members.iter().zip(&shares).map(named).collect();
        format!(" by speed: {}", named.join(", "))
    };
    let range = |end: &mut u32, share: u32| {
        let start = *end;
        *end += share;
        Some(start..*end)
    };
    (shares.into_iter().scan(0, range).collect(), how)
}

/// Where these members get the most advanced state.
fn source(state: &Membership, members: &[WorkerId]) -> Source {
    let stage = |id: &WorkerId| state.states.get(id).copied();
    let Some(best) = members.iter().filter_map(stage).max() else { return Source::Disk };
    let holds = |id: &WorkerId| stage(id) == Some(best);
    match members.iter().position(holds) {
        Some(rank) if !members.iter().all(holds) => Source::Member(rank as u32, best),
        _ => Source::Kept(best),
    }
}

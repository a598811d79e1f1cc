//! Memberships that are wrong in one way each: what the simulation must find.

use super::*;

/// Each with what is wrong about it.
pub(crate) const ALL: [(&str, Decide); 9] = [
    ("the next generation has the number of the last", reuses_the_number),
    ("a generation forms while members of the last one have not stopped", waits_for_nobody),
    ("the least advanced state is gone on from", goes_on_from_the_least_advanced),
    ("who came later is taken to hold the state", takes_all_for_holders),
    ("an evaluation that was cut off is forgotten", forgets_the_evaluation),
    ("a member that is gone is waited for", waits_for_the_lost),
    ("a shard belongs to nobody", leaves_out_a_shard),
    ("a shard that is dealt by speed belongs to two", deals_a_shard_twice),
    ("who comes back is taken to hold nothing", forgets_who_comes_back),
];

/// What is decided with each source of a state changed.
fn with_source(
    now: Duration,
    state: Membership,
    event: Event,
    change: impl Fn(&Membership, &[Member], Source) -> Source,
) -> Decision {
    let mut with_event = state.clone();
    if let Event::Stopped { id, state: Some(stage), .. } = &event {
        with_event.states.insert(*id, *stage);
    }
    let (next, mut actions, reason) = membership(now, state, event);
    for action in &mut actions {
        if let Action::Form(_, members, source) = action {
            *source = change(&with_event, members, *source);
        }
    }
    (next, actions, reason)
}

fn reuses_the_number(now: Duration, state: Membership, event: Event) -> Decision {
    let is_first = state.generation == 0;
    let (mut next, mut actions, reason) = membership(now, state, event);
    for action in &mut actions {
        if let Action::Form(generation, ..) = action
            && !is_first
        {
            *generation -= 1;
            next.generation = *generation;
        }
    }
    (next, actions, reason)
}

fn waits_for_nobody(now: Duration, state: Membership, event: Event) -> Decision {
    let (mut next, actions, reason) = membership(now, state, event);
    if let Phase::Stopping { at_work, aborted: Some(_), .. } = &mut next.phase
        && !next.states.is_empty()
    {
        at_work.clear();
        return rest(next, now, actions);
    }
    (next, actions, reason)
}

fn goes_on_from_the_least_advanced(now: Duration, state: Membership, event: Event) -> Decision {
    with_source(now, state, event, |with_event, members, source| {
        let held = members.iter().zip(0..).filter_map(|(member, rank)| {
            with_event.states.get(&member.worker_id).map(|&stage| (stage, rank))
        });
        match (source, held.min()) {
            (Source::Member(..), Some((stage, rank))) => Source::Member(rank, stage),
            _ => source,
        }
    })
}

fn takes_all_for_holders(now: Duration, state: Membership, event: Event) -> Decision {
    with_source(now, state, event, |_, _, source| match source {
        Source::Member(_, stage) => Source::Kept(stage),
        other => other,
    })
}

fn forgets_the_evaluation(now: Duration, state: Membership, event: Event) -> Decision {
    let whole = |stage: Stage| Stage { whole: true, ..stage };
    with_source(now, state, event, |_, _, source| match source {
        Source::Member(rank, stage) => Source::Member(rank, whole(stage)),
        Source::Kept(stage) => Source::Kept(whole(stage)),
        Source::Disk => Source::Disk,
    })
}

fn waits_for_the_lost(now: Duration, state: Membership, event: Event) -> Decision {
    let is_waited_for =
        |id: &WorkerId| matches!(&state.phase, Phase::Stopping { at_work, .. } if at_work.contains(id));
    let lost = match &event {
        Event::Left(id, _) if state.members.contains(id) || is_waited_for(id) => Some(*id),
        _ => None,
    };
    let (mut next, actions, reason) = membership(now, state, event);
    if let Phase::Stopping { at_work, .. } = &mut next.phase {
        at_work.extend(lost);
    }
    (next, actions, reason)
}

fn leaves_out_a_shard(now: Duration, state: Membership, event: Event) -> Decision {
    let (next, mut actions, reason) = membership(now, state, event);
    for action in &mut actions {
        if let Action::Form(generation, members, _) = action
            && *generation > 1
            && members.len() > 1
            && members[0].shards.len() > 1
        {
            members[0].shards.end -= 1;
        }
    }
    (next, actions, reason)
}

fn deals_a_shard_twice(now: Duration, state: Membership, event: Event) -> Decision {
    let (next, mut actions, reason) = membership(now, state, event);
    for action in &mut actions {
        if let Action::Form(_, members, _) = action
            && reason.contains(" by speed: ")
        {
            members[0].shards.end += 1;
        }
    }
    (next, actions, reason)
}

fn forgets_who_comes_back(now: Duration, state: Membership, event: Event) -> Decision {
    let event = match event {
        Event::Joined(id, candidate, _) => Event::Joined(id, candidate, Holds::Nothing),
        other => other,
    };
    membership(now, state, event)
}

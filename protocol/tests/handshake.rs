//! What the handshake promises against somebody on the way between two sides that have the token.

use protocol::handshake::{HELLO_BYTES, Handshake, PROOF_BYTES, Plane, Token};

/// Both sides of a control connection with the same token.
fn sides() -> (Handshake, Handshake) {
    let token = Token::new("a token of both sides");
    let opener = Handshake::opener(Plane::Control, &token).unwrap();
    (opener, Handshake::answerer(Plane::Control, &token).unwrap())
}

#[test]
fn a_recorded_handshake_proves_nothing_to_anybody_later() {
    let (opener, answerer) = sides();
    let (hello, answer) = (opener.hello(), answerer.hello());
    let (of_opener, of_answerer) =
        (opener.proofs(&answer).unwrap().ours, answerer.proofs(&hello).unwrap().ours);
    assert!(answerer.proofs(&hello).unwrap().check(&of_opener).is_ok());
    for _ in 0..20 {
        let (opener, answerer) = sides();
        assert!(answerer.proofs(&hello).unwrap().check(&of_opener).is_err(), "an opener was replayed");
        assert!(opener.proofs(&answer).unwrap().check(&of_answerer).is_err(), "an answerer was replayed");
        // Nor does one of the other side, or of another purpose.
        assert!(answerer.proofs(&hello).unwrap().check(&of_answerer).is_err(), "a proof was reflected");
    }
}

#[test]
fn whoever_changes_one_bit_of_a_hello_on_its_way_ends_the_handshake() {
    let (opener, answerer) = sides();
    for bit in 0..8 * HELLO_BYTES {
        let change = |hello: [u8; HELLO_BYTES]| {
            let mut changed = hello;
            changed[bit / 8] ^= 1 << (bit % 8);
            changed
        };
        // The version and the purpose are among the bits that both sides prove: nobody is talked into an older one.
        let by_opener = opener.proofs(&answerer.hello()).unwrap().ours;
        let is_let_in =
            answerer.proofs(&change(opener.hello())).is_ok_and(|proofs| proofs.check(&by_opener).is_ok());
        assert!(!is_let_in, "bit {bit} of the opener's hello");
        let by_answerer = answerer.proofs(&opener.hello()).unwrap().ours;
        let is_believed =
            opener.proofs(&change(answerer.hello())).is_ok_and(|proofs| proofs.check(&by_answerer).is_ok());
        assert!(!is_believed, "bit {bit} of the answerer's hello");
    }
}

#[test]
fn the_data_plane_of_another_generation_or_run_lets_nobody_in() {
    let run = Token::new("a token of both sides");
    let tokens = [
        run.clone(),
        run.for_generation(1),
        run.for_generation(2),
        Token::new("another run").for_generation(1),
    ];
    for (i, ours) in tokens.iter().enumerate() {
        for (j, theirs) in tokens.iter().enumerate() {
            let opener = Handshake::opener(Plane::Data, ours).unwrap();
            let answerer = Handshake::answerer(Plane::Data, theirs).unwrap();
            let proof: [u8; PROOF_BYTES] = opener.proofs(&answerer.hello()).unwrap().ours;
            let is_let_in = answerer.proofs(&opener.hello()).unwrap().check(&proof).is_ok();
            assert_eq!(is_let_in, i == j, "tokens {i} and {j}");
        }
    }
}

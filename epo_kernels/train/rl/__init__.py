"""From episodes to updated weights: advantages, learner, critic, optimizer."""

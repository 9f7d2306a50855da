"""What the API and the workers share: the words of Graft, its arithmetic, and its doors to the outside."""
